"""Runs that are stopped, killed or damaged go on bit for bit, or say why they cannot."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch

from blt_core.component import BuildContext
from blt_core.errors import CheckpointError, DataError, RunError
from blt_core.plugins.loading import load_plugins
from blt_core.wiring.config import Config
from blt_plugins.training.backends.torch import TorchBackend, TorchBackendParams
from blt_plugins.training.run.job import Job
from blt_plugins.training.run.make_job import make_job
from blt_plugins.training.run.report import SilentReport
from blt_plugins.training.run.resume import OtherSettingsError
from blt_plugins.training.run.trainer import Trainer
from tests.training.runs import assert_same_run, metrics, sends, stored

#: Trains in a process of its own for each place, which kills itself there.
KILLED = """
import json, os, re, shutil, signal, sys
from pathlib import Path
import safetensors.torch

calls_left = 0

def dying(name, function):
    def call(*arguments, phase="", step="", **keys):
        global calls_left
        given = [str(a) for a in arguments[:2] if isinstance(a, (str, Path))]
        calls_left -= bool(re.search(place, " ".join([name, *given, phase, str(step)])))
        if calls_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        keys |= {"phase": phase, "step": step} if phase else {}
        return function(*arguments, **keys)
    return call

for holder, name in (
    (Path, "rename"), (Path, "replace"), (Path, "write_text"),
    (shutil, "rmtree"), (safetensors.torch, "save_file"),
):
    setattr(holder, name, dying(name, getattr(holder, name)))

from blt_core.wiring.config import Config
from blt_core.plugins.loading import load_plugins
from blt_plugins.training.run.make_job import make_job
from blt_plugins.training.run.trainer import Trainer
from blt_plugins.training.run.metrics import Metrics
from blt_plugins.training.run.report import SilentReport
Metrics.write = dying("log", Metrics.write)

config, out = Config.from_mapping(json.loads(sys.argv[1]), "tiny.toml"), Path(sys.argv[2])
plugins, ends = load_plugins(), {}
for name, (place, calls_left) in json.loads(sys.argv[3]).items():
    if (child := os.fork()) == 0:
        Trainer(make_job(config, plugins, out=out / name), SilentReport()).run()
        os._exit(0)
    ends[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(ends))
"""


#: Where runs are killed: before the call of a pattern, and which of these calls.
PLACES = {
    "a scorer step": (r"log .*scorer 7", 1),
    "within a state": (r"write_text .*/\.scorer-00000005\.new-0/state\.json", 1),
    "before a state has its name": (r"rename .*/\.scorer-00000008\.new-0 ", 1),
    "at the calibration": (r"log .*patches 0", 1),
    "before a former state is removed": (r"rmtree .*/\.scorer-00000000\.old-", 1),
    "a model step": (r"log .*model 8", 1),
    "within the first model": (r"save_file .*/\.model\.new-", 1),
    "before it has its name": (r"rename .*/\.model\.new-", 1),
    "when the former model has lost its name": (r"rename .*/\.model\.new-", 2),
    "before the former model is removed": (r"rmtree .*/\.\.model\.old\.new-", 1),
    "before the last state has its name": (r"rename .*/\.model-00000012\.new-0 ", 1),
    "when all is written": (r"rmtree .*/\.model-00000000\.old-", 1),
}


@pytest.fixture(scope="module")
def whole(lasting_tables, tmp_path_factory) -> Job:
    """A job that nothing has stopped."""
    config = Config.from_mapping(lasting_tables, "tiny.toml")
    job = make_job(config, load_plugins(), out=tmp_path_factory.mktemp("whole"))
    Trainer(job, SilentReport()).run()
    return job


@pytest.fixture(scope="module")
def killed(lasting_tables, tmp_path_factory, forks) -> Callable[[str], Job]:
    """Makes the job of a run that was killed at a place, or of ``whole``, which was not."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = map(json.dumps, (lasting_tables, str(folder), {**PLACES, "whole": ("(?!)", 1)}))
    (folder / "killed.py").write_text(KILLED)
    command = [str(folder / "killed.py"), *(text.strip('"') for text in arguments)]
    done = forks.run(1, command, {})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {**dict.fromkeys(PLACES, -signal.SIGKILL), "whole": 0}
    config = Config.from_mapping(lasting_tables, "tiny.toml")
    return lambda name: make_job(config, load_plugins(), out=folder / name)


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_is_killed_anywhere_goes_on_bit_for_bit(killed, silent, place):
    whole, again = killed("whole"), killed(place)
    for job in (whole, again):
        Trainer(job, silent()).run()
    assert_same_run(whole, again)
    ours, theirs = stored(whole.out / "model"), stored(again.out / "model")
    assert ours[0] == theirs[0]
    assert all(torch.equal(ours[1][name], theirs[1][name]) for name in ours[1])
    assert not [path for path in again.out.rglob("*") if path.name.startswith(".")]


def test_damaged_states_are_passed_over_and_the_run_is_the_same(whole, new_job, silent):
    def stop_at(step: int) -> Path:
        report = silent(sends("model", step, signal.SIGTERM))
        with pytest.raises(RunError, match="interrupted"):
            Trainer(new_job("part"), report).run()
        return new_job("part").out / "state" / f"model-{step:08}"

    path = stop_at(7) / "training.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    path = stop_at(8) / "state.json"
    path.write_text(path.read_text().replace('"step": 8', '"step": 9'))
    again, report = new_job("part"), silent()
    Trainer(again, report).run()
    eight, seven, resumed = report.notes[1:4]
    assert re.match(r"warning: .*model-00000008: this state is damaged \(state\.json is", eight)
    assert re.match(r"warning: .*model-00000007: this state is damaged \(training\.", seven)
    assert resumed == "resumed at model step 5"
    assert_same_run(whole, again)


def test_a_sigterm_after_a_ctrl_c_changes_nothing_and_a_second_ctrl_c_stops_at_once(
    new_job, silent
):
    interrupt, term = signal.SIGINT, signal.SIGTERM
    for numbers in ((interrupt, term, term), (term, interrupt)):
        report = silent(sends("model", 2, *numbers))
        with pytest.raises(RunError, match="interrupted at model step 2, which is saved"):
            Trainer(new_job(), report).run(fresh=True)
        assert report.notes[-1] == f"{numbers[0].name}: stopping after this step"
    with pytest.raises(KeyboardInterrupt):
        Trainer(new_job(), silent(sends("model", 2, interrupt, interrupt))).run(fresh=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", [("scorer", 8), ("model", 7)])
def test_an_interrupt_saves_and_says_how_to_go_on(whole, new_job, silent, where, number):
    handler = signal.getsignal(number)
    stopped = silent(sends(*where, number))
    with pytest.raises(RunError, match=r"interrupted at \w+ step \d+, .*run the same command") as e:
        Trainer(new_job("stopped"), stopped).run()
    assert e.value.exit_code == 1
    assert signal.getsignal(number) is handler
    assert list(stopped.losses)[-1] == where
    again, report = new_job("stopped"), silent()
    Trainer(again, report).run()
    assert not report.losses.keys() & stopped.losses.keys()  # no step is taken twice
    assert_same_run(whole, again)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["calibration", "scorer", "model"])
def test_a_signal_within_scores_or_calibration_ends_them_after_the_batch(
    whole, new_job, silent, monkeypatch, phase, number
):
    job, batches = new_job("stopped"), []
    patcher = type(job.model.patcher)
    scorer = type(job.model.patcher.byte_scorer)
    holder, name = {
        "calibration": (patcher, "entropies"),
        "scorer": (scorer, "logits"),
        "model": (patcher, "flags"),
    }[phase]
    trainer, inner = Trainer(job, silent()), getattr(holder, name)
    held_out = {
        id(batch.rows.ids_br) for batch in (*trainer._data.valid, *trainer._data.calibration)
    }

    @functools.wraps(inner)  # its signature is part of the contract
    def signalling(self, rows, *arguments):
        if id(rows.ids_br) in held_out:
            batches.append(rows)
            os.kill(os.getpid(), number if len(batches) == 1 else 0)
        return inner(self, rows, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(holder, name, signalling)
        with pytest.raises(RunError, match=r"interrupted .*run the same command again") as error:
            trainer.run()
    assert error.value.exit_code == 1
    assert len(batches) == 1, error.value
    again, report = new_job("stopped"), silent()
    Trainer(again, report).run()
    assert_same_run(whole, again)


def test_a_finished_run_has_nothing_left_to_do(new_job, silent):
    first = Trainer(new_job(), silent()).run()
    report, out = silent(), new_job().out
    before = {path: path.stat().st_mtime_ns for path in (out / "model").iterdir()}
    again = Trainer(new_job(), report).run()
    assert report.losses == {}
    assert report.notes[1] == "already finished (model step 12); --fresh trains anew"
    assert {path: path.stat().st_mtime_ns for path in (out / "model").iterdir()} == before
    assert again.threshold == first.threshold
    assert again.best_bits_per_byte == first.best_bits_per_byte


def test_another_configuration_is_refused_and_fresh_starts_anew(new_job, silent, tables, texts):
    Trainer(new_job(), silent()).run()
    with pytest.raises(OtherSettingsError, match=r"train\.learning_rate: 0\.005 there, 0\.002 now"):
        Trainer(new_job(learning_rate=2e-3), silent()).run()
    Trainer(new_job(checkpoint_every=3, log_every=2), silent()).run()  # no step depends on these
    tables["run"] = {"dtype": "float64"}
    with pytest.raises(OtherSettingsError, match=r"run\.dtype: 'float32' there, 'float64' now"):
        Trainer(new_job(), silent()).run()
    del tables["run"]
    (texts / "part0" / "new.py").write_text("x = 1\n")
    with pytest.raises(OtherSettingsError, match=r"text: "):
        Trainer(new_job(), silent()).run()
    older = new_job().out / "model-last"
    shutil.copytree(older.with_name("model"), older)
    (older / "README").write_text("mine")
    with pytest.raises(DataError, match="model-last: not removed, since it holds README"):
        Trainer(new_job(learning_rate=2e-3), silent()).run(fresh=True)
    assert (older / "README").read_text() == "mine"
    (older / "README").rename(older / ".DS_Store")  # nobody's work
    job, report = new_job(learning_rate=2e-3), silent()
    Trainer(job, report).run(fresh=True)
    assert not older.exists()
    assert len(report.losses) == 8 + 12
    assert [r["step"] for r in metrics(job.out) if "loss" in r] == [*range(1, 9), *range(1, 13)]


@pytest.mark.parametrize("scorer", [8, 0])
def test_a_fresh_start_replaces_the_former_state_before_the_first_step(new_job, silent, scorer):
    def stop(_phase, _step):
        raise KeyboardInterrupt

    Trainer(new_job(scorer={"steps": scorer}), silent()).run()
    with pytest.raises(KeyboardInterrupt):
        Trainer(new_job(scorer={"steps": scorer}), silent(stop)).run(fresh=True)
    report = silent()
    Trainer(new_job(scorer={"steps": scorer}), report).run()
    assert len(report.losses) == scorer + 12


class Foreign(TorchBackend):
    """A backend whose states another one cannot read."""

    def save(self, folder: Path) -> None:
        (folder / "weights.bin").write_text("weights")


def test_the_state_of_another_training_backend_is_refused(new_job, silent):
    job = new_job()
    other = Foreign(TorchBackendParams(), BuildContext(job.model.scheme))
    with pytest.raises(RunError):
        Trainer(attrs.evolve(job, backend=other), silent(sends("model", 2, signal.SIGTERM))).run()
    with pytest.raises(CheckpointError, match=r"model-00000002: holds no training\.safeten") as e:
        Trainer(new_job(), silent()).run()
    assert "fix: go on with that backend, or start anew from OUT/model" in str(e.value)
