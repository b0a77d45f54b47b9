"""Training runs: they learn, stop and go on exactly, and fail with a useful message."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from blt_core.component import BuildContext
from blt_core.errors import CheckpointError, ConfigError, DataError, RunError
from blt_core.loading import read_checkpoint
from blt_core.pipeline import Pipeline
from blt_core.plugins.loading import load_plugins
from blt_core.storage.tensors import load_tensors
from blt_core.wiring.config import Config
from blt_plugins.training.backends.parameters import parameter_groups
from blt_plugins.training.backends.torch import TorchBackend, TorchBackendParams
from blt_plugins.training.cli.threshold import write_threshold
from blt_plugins.training.data.load import load_data
from blt_plugins.training.run.folder import RunFolder
from blt_plugins.training.run.job import Job
from blt_plugins.training.run.judge import of_first
from blt_plugins.training.run.make_job import make_job
from blt_plugins.training.run.phases import make_phases
from blt_plugins.training.run.states import OtherSettingsError
from blt_plugins.training.run.trainer import Trainer


def metrics(out: Path) -> list[dict[str, Any]]:
    """The records of a run, without the speed, which no two runs share."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "bytes_per_second"} for x in lines]


def model_scores(out: Path) -> list[float]:
    """The held-out scores of the model, in order."""
    return [
        r["bits_per_byte"] for r in metrics(out) if r["phase"] == "model" and "bits_per_byte" in r
    ]


def stored(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Tables and tensors of a checkpoint folder."""
    tables, tensors = read_checkpoint(str(folder), load_plugins())
    return tables, {name: tensor.clone() for name, tensor in tensors.items()}


def tensors_of(job) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in job.model.module_dict().state_dict().items()}


def assert_same_run(one, other) -> None:
    """Two runs logged the same and ended in the same weights, bit for bit."""
    assert metrics(one.out) == metrics(other.out)
    ours, theirs = tensors_of(one), tensors_of(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def sends(phase: str, step: int, *numbers: signal.Signals) -> Callable[[str, int], None]:
    """What a report does after each step: sends signals to this process after one of them."""

    def send(*now) -> None:
        for number in numbers if now == (phase, step) else ():
            os.kill(os.getpid(), number)

    return send


# -- learning ------------------------------------------------------------------------------------


def test_a_tiny_model_learns_and_its_checkpoint_is_the_model(new_job, silent, tmp_path):
    job = new_job(steps=60, validate_every=20, scorer={"steps": 40})
    report = silent()
    result = Trainer(job, report).run()
    scores = model_scores(job.out)
    assert len(scores) == 3
    assert scores[-1] < scores[0] < 8
    assert result.best_bits_per_byte == min(scores)
    assert report.losses["scorer", 40] < report.losses["scorer", 1] - 1
    assert report.losses["model", 60] < report.losses["model", 1] - 1.5
    pipeline = Pipeline.from_config({"schema": 1, "run": {"checkpoint": str(job.out / "model")}})
    stored = pipeline.model
    assert stored.patcher.threshold == job.model.patcher.threshold == result.threshold > 0
    assert stored.context_bytes == 64
    load_tensors(stored.module_dict(), tensors_of(job), "test")  # the same names and shapes
    assert len(pipeline.generate("def ", max_new_bytes=8).output) <= 8


def test_the_threshold_is_calibrated_unless_it_is_given(new_job, silent, tables):
    job = new_job(steps=1)
    Trainer(job, silent()).run()
    (found,) = [r for r in metrics(job.out) if "threshold" in r]
    assert found["mean_patch_bytes"] == pytest.approx(4.0, rel=0.1)
    assert job.model.patcher.threshold == found["threshold"]
    tables["patcher"]["threshold"] = 1.25
    job = new_job("given", steps=1)
    Trainer(job, silent()).run()
    assert job.model.patcher.threshold == 1.25
    assert not [r for r in metrics(job.out) if "threshold" in r]


def test_a_patcher_without_a_scorer_needs_no_first_phase(new_job, silent, tables):
    tables["patcher"] = {"use": "static", "patch_bytes": 4}
    job, report = new_job(), silent()
    Trainer(job, report).run()
    assert {phase for phase, _ in report.losses} == {"model"}


def test_the_scorer_stays_as_it_is_while_the_model_is_trained(new_job, silent, tmp_path):
    seen = []

    def look(phase, step):
        scorer = job.model.patcher.byte_scorer.head.weight
        if phase == "model":
            seen.append(scorer.detach().clone())

    job = new_job(save_dtype="bfloat16")
    Trainer(job, silent(look)).run()
    assert all(torch.equal(seen[0], each) for each in seen)
    # What is stored is what the patches of training came from.
    assert torch.equal(seen[0], seen[0].bfloat16().float())


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_passes_make_the_step_of_one_pass_over_all_of_them(new_job, silent, accumulate):
    job = new_job(accumulate=accumulate)
    job.model.patcher.threshold = 5.55
    data = load_data(job.corpus, job.settings, job.model)
    phase = make_phases(job.model, job.objective, job.settings, data.documents, data.windows)[-1]
    phase.module.double()
    job.model.patcher.double()
    batches = [phase.batches[i] for i in range(accumulate)]
    assert len({batch.scored for batch in batches}) > 1, "unequal sizes are the point"
    phase.module.zero_grad()
    scored = sum(batch.scored for batch in batches)
    for batch in batches:
        (phase.module(batch, torch.Generator())[0] * batch.scored / scored).backward()
    expected = torch.cat([p.grad.flatten() for p in phase.module.parameters()]).norm()
    phase.module.zero_grad()
    job.backend.start(
        phase.module, parameter_groups(phase.module, 0), clip=1.0, accumulate=accumulate
    )
    figures, size = Trainer(job, silent())._step(phase, phase.module, 0, job.backend)
    assert size == scored
    assert figures["grad_norm"] == pytest.approx(float(expected), rel=1e-9)


@attrs.define
class Scaled:
    """An objective whose loss is multiplied by ``factor`` from call ``since`` on."""

    inner: Any
    factor: float
    since: int
    calls: int = 0

    def loss(self, *arguments):
        self.calls += 1
        loss, _ = self.inner.loss(*arguments)
        return (loss * self.factor if self.calls >= self.since else loss), {"calls": self.calls}


def test_the_best_model_is_kept_and_a_worse_last_one_written_beside_it(new_job, silent):
    job = new_job(steps=12, validate_every=4)
    job = attrs.evolve(job, objective=Scaled(job.objective, -1.0, since=7))
    result = Trainer(job, silent()).run()
    scores = model_scores(job.out)
    assert min(scores) < scores[2], "the last score follows steps up the hill"
    assert result.best_bits_per_byte == min(scores)
    assert result.held_out.bits_per_byte == scores[2]
    assert [r["calls"] for r in metrics(job.out) if "calls" in r] == list(range(1, 13))
    config = {"schema": 1, "run": {"checkpoint": str(job.out / "model-last")}}
    last = tensors_of(Pipeline.from_config(config))
    assert all(torch.equal(last[name], tensor) for name, tensor in tensors_of(job).items())


def test_a_run_that_is_killed_after_its_last_step_has_written_all(new_job, silent, monkeypatch):
    def stop(self, phase, step, backend, **state):
        if (phase.name, step) == ("model", 12):
            raise KeyboardInterrupt
        save(self, phase, step, backend, **state)

    save = RunFolder.save
    monkeypatch.setattr(RunFolder, "save", stop)
    job = new_job(steps=12, validate_every=4)
    job = attrs.evolve(job, objective=Scaled(job.objective, -1.0, since=7))
    with pytest.raises(KeyboardInterrupt):
        Trainer(job, silent()).run()
    assert (job.out / "model-last" / "config.toml").exists()


def test_a_run_begins_by_telling_how_much_text_there_is(new_job, silent):
    job, report = new_job(steps=1), silent()
    Trainer(job, report).run()
    sides = [list(job.corpus.documents(side)) for side in ("train", "valid")]
    (train, size), (valid, held) = ((len(side), sum(map(len, side))) for side in sides)
    assert report.notes[0] == (
        f"corpus: {train} documents ({size} bytes) to train on, "
        f"{valid} documents ({held} bytes) held out"
    )


def test_the_random_choices_of_a_step_are_drawn_on_the_cpu(new_job, silent):
    job = new_job(steps=1)
    seen = []

    class Spy:
        def loss(self, *arguments):
            seen.append(arguments[-1].device)
            return job.objective.loss(*arguments)

    Trainer(attrs.evolve(job, objective=Spy()), silent()).run()
    assert seen == [torch.device("cpu")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_block_diffusion_trains_on_cuda(new_job, silent, tables):
    tables["run"] = {"device": "cuda"}
    tables["objective"] = {"use": "block-diffusion", "share": 0.5, "stale_share": 0.5}
    tables["decoder"]["denoises"] = True
    report = silent()
    Trainer(new_job(), report).run()
    assert ("model", 12) in report.losses


def test_without_held_out_text_the_last_model_is_written(new_job, silent, tables):
    tables["corpus"]["valid_percent"] = 0
    with pytest.raises(DataError, match=r"holds no document out; .* train.valid_bytes = 0"):
        Trainer(new_job(), silent())
    job = new_job(valid_bytes=0)
    assert Trainer(job, silent()).run().best_bits_per_byte is None
    assert (job.out / "model" / "config.toml").exists()


# -- stopping and going on -----------------------------------------------------------------------

#: Trains in a process of its own for each place, which kills itself there.
KILLED = """
import json, os, re, shutil, signal, sys
from pathlib import Path
import safetensors.torch, torch
import matplotlib.figure, torch._dynamo  # what a run imports, once for all of them
torch.set_num_threads(1)

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
def killed(lasting_tables, tmp_path_factory) -> Callable[[str], Job]:
    """Makes the job of a run that was killed at a place, or of ``whole``, which was not."""
    folder = tmp_path_factory.mktemp("killed")
    train = {**lasting_tables["train"], "tensorboard": False}
    tables = {**lasting_tables, "train": train}
    arguments = map(json.dumps, (tables, str(folder), {**PLACES, "whole": ("(?!)", 1)}))
    command = [sys.executable, "-c", KILLED, *(text.strip('"') for text in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {**dict.fromkeys(PLACES, -signal.SIGKILL), "whole": 0}
    config = Config.from_mapping(tables, "tiny.toml")
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


def test_damaged_states_are_passed_over_and_the_run_is_the_same(new_job, silent):
    whole = new_job("whole")
    Trainer(whole, silent()).run()

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
def test_an_interrupt_saves_and_says_how_to_go_on(new_job, silent, where, number):
    whole = new_job("whole")
    Trainer(whole, silent()).run()

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
    new_job, silent, monkeypatch, phase, number
):
    whole = new_job("whole")
    Trainer(whole, silent()).run()

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


class Third:
    """A process of seven, whose first one has something else."""

    rank, world_size = 2, 7

    def __init__(self, first: float) -> None:
        self.first = first

    def mean(self, values):
        assert set(values) == {0}
        return [half / 7 for half in struct.unpack("<2I", struct.pack("<d", self.first))]


@pytest.mark.parametrize("value", [0.1 + 0.2, -2.540958, 1e-308, 5e307, 0.0])
def test_what_process_0_has_found_is_in_all_to_the_last_bit(value):
    assert of_first(Third(value), 0.5) == value


# -- failing -------------------------------------------------------------------------------------


@attrs.define
class Spoilt:
    """An objective whose gradient is no number in call ``since``, though the loss is one."""

    inner: Any
    since: int
    calls: int = 0

    def loss(self, *arguments):
        self.calls += 1
        loss, figures = self.inner.loss(*arguments)
        nothing = (loss - loss.detach()).sqrt()  # 0, and its gradient is infinite
        return (loss + 0 * nothing if self.calls == self.since else loss), figures


@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
def test_what_is_no_number_stops_the_run_and_names_what_is_good(new_job, silent, what):
    whole, undisturbed = new_job("whole", validate_every=4), silent()
    Trainer(whole, undisturbed).run()
    job = new_job(validate_every=4)
    inner, best = job.objective, job.out / "model"
    objective = Spoilt(inner, 7) if what == "gradient" else Scaled(inner, float(what), since=7)
    with pytest.raises(RunError) as caught:
        Trainer(attrs.evolve(job, objective=objective), silent()).run()
    found = "gradient norm is nan" if what == "gradient" else f"loss is {what}"
    text = str(caught.value).splitlines()[0]
    state = job.out / "state" / "model-00000005"
    assert text == (
        f"model step 7: the {found}; the last good state is {state}, the best model so far {best}"
    )
    assert state.is_dir()
    assert (best / "config.toml").exists()
    assert caught.value.exit_code == 1
    again, report = new_job(validate_every=4), silent()
    Trainer(again, report).run()  # the state before it is good
    assert next(iter(report.losses)) == ("model", 6)
    assert report.losses.items() <= undisturbed.losses.items()
    ours, theirs = tensors_of(again), tensors_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_before_the_first_score_no_model_is_called_good(new_job, silent):
    job = new_job()
    job = attrs.evolve(job, objective=Scaled(job.objective, float("nan"), since=2))
    with pytest.raises(RunError, match=r"the last good state is \S+/model-00000000\n"):
        Trainer(job, silent()).run()


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


def test_every_fault_of_a_config_is_told_with_its_place(tables):
    tables["train"] |= {"stepz": 3, "clip": 0, "scorer": {"steps": -1}}
    with pytest.raises(ConfigError) as caught:
        make_job(Config.from_mapping(tables, "tiny.toml"), load_plugins())
    text = str(caught.value)
    for place in ("stepz: unknown key", "clip: ", "scorer.steps: "):
        assert f"tiny.toml: train.{place}" in text


@pytest.mark.parametrize(
    ("table", "keys", "message"),
    [
        ("train", {"context_bytes": 65}, "train.context_bytes: 65 is more than the model serves"),
        ("run", {"dtype": "bfloat16"}, "run.dtype: training runs in float32"),
        ("run", {"seed": 3}, "run.seed: training draws from train.seed, which is 0; remove"),
        (
            "train",
            {"scorer": {"target_patch_bytes": 9.0}},
            "train.scorer.target_patch_bytes: 9.0 is more than the longest patch",
        ),
    ],
)
def test_what_only_training_minds_is_told_before_any_work(tables, table, keys, message):
    tables[table] = {**tables.get(table, {}), **keys}
    with pytest.raises(ConfigError, match=re.escape(f"tiny.toml: {message}")):
        make_job(Config.from_mapping(tables, "tiny.toml"), load_plugins())


@pytest.fixture
def further(new_job, silent, tables) -> Callable[..., Job]:
    """Makes a job that goes on from the model of a finished run; keys go into its decoder table."""
    first = new_job("first")
    Trainer(first, silent()).run()
    kept = {k: v for k, v in tables.items() if k in {"schema", "corpus", "train"}}
    kept["train"] = {k: v for k, v in kept["train"].items() if k != "scorer"}

    def make(out: str = "out", **changes: Any) -> Job:
        run = {"checkpoint": str(first.out / "model")}
        config = Config.from_mapping({**kept, "run": run} | changes, "more.toml")
        return make_job(config, load_plugins(), out=first.out.parent / out)

    return make


def test_training_goes_on_from_a_checkpoint(silent, further):
    job = further()
    _, model = stored(job.out.parent / "first/model")
    assert all(torch.equal(t, model[name]) for name, t in tensors_of(job).items())
    result = Trainer(job, silent()).run()
    after = tensors_of(job)
    changed = {name for name, t in after.items() if not torch.equal(t, model[name])}
    assert changed == {name for name in after if not name.startswith("patcher.")}
    assert result.threshold == further().model.patcher.threshold > 0
    assert {row["phase"] for row in metrics(job.out)} == {"model"}


def test_training_from_a_checkpoint_teaches_its_decoder_to_denoise(silent, further):
    blocks = {"use": "block-diffusion", "block_bytes": 4, "stale_share": 0.25}
    with pytest.raises(ConfigError, match="trained without blocks"):
        further(objective=blocks)
    job = further(objective=blocks, decoder={"denoises": True})
    Trainer(job, silent()).run()
    assert stored(job.out / "model")[0]["decoder"]["denoises"] is True
    # What was trained stays so: a run cannot claim otherwise.
    config = {"schema": 1, "run": {"checkpoint": str(job.out / "model")}}
    with pytest.raises(ConfigError, match=r"decoder\.denoises: comes from the checkpoint"):
        Pipeline.from_config({**config, "decoder": {"denoises": False}})


def test_a_run_from_a_checkpoint_is_resumed_where_it_was_stopped(silent, further):
    whole = further("whole")
    Trainer(whole, silent()).run()

    with pytest.raises(RunError, match="interrupted at model step 7"):
        Trainer(further("stopped"), silent(sends("model", 7, signal.SIGTERM))).run()
    again = further("stopped")
    Trainer(again, silent()).run()
    assert_same_run(whole, again)


def test_a_run_from_a_checkpoint_scores_the_scorer_that_it_stores(silent, further):
    job = further(train={"steps": 2, "save_dtype": "bfloat16", "valid_bytes": 300})
    Trainer(job, silent()).run()
    _, model = stored(job.out / "model")
    ours = tensors_of(job)
    names = [name for name in ours if name.startswith("patcher.")]
    assert names
    assert all(torch.equal(ours[name], model[name].float()) for name in names)


@pytest.mark.parametrize("name", ["model", "model-last"])
def test_training_does_not_write_over_the_checkpoint_it_starts_from(further, tmp_path, name):
    first = tmp_path / "first"
    if name != "model":
        shutil.copytree(first / "model", first / name)
    with pytest.raises(ConfigError, match=r"run\.checkpoint: training would write over it"):
        further("first", run={"checkpoint": str(first / name)})


def test_after_its_phase_nothing_is_kept_of_a_scorer_s_optimizer(new_job, silent):
    kept = set()

    def look(phase: str, _step: int) -> None:
        kept.add((phase, len(trainer._scorer_backend._optimizers)))

    trainer = Trainer(new_job(), silent(look))
    trainer.run()
    assert kept == {("scorer", 1), ("model", 0)}


@pytest.mark.parametrize("claimed", [True, False])
def test_an_objective_must_train_what_the_config_claims(new_job, tables, claimed):
    tables["decoder"]["denoises"] = claimed
    if not claimed:
        new_job()
        return
    with pytest.raises(ConfigError, match=r"decoder\.denoises: the objective 'ar' does not train"):
        new_job()


def test_what_a_checkpoint_gives_cannot_be_trained_or_given_again(further):
    with pytest.raises(ConfigError) as caught:
        further(train={"steps": 3, "scorer": {"steps": 2}})
    assert "train.scorer: the scorer and its threshold come from" in str(caught.value)
    with pytest.raises(ConfigError, match=r"decoder\.layers: comes from the checkpoint"):
        further(decoder={"layers": 4})


@pytest.mark.parametrize("table", ["corpus", "model", "train", "decoder"])
def test_a_missing_table_is_named(tables, table):
    del tables[table]
    with pytest.raises(ConfigError, match=rf"tiny\.toml: {table}: missing"):
        make_job(Config.from_mapping(tables, "tiny.toml"), load_plugins())


# -- ways to compute the same ----------------------------------------------------------------------

BLOCKS = {"use": "block-diffusion", "block_bytes": 4, "share": 0.5, "stale_share": 0.5}


def test_checkpointed_gradients_are_those_of_plain_passes(new_job, silent, tables):
    tables |= {"objective": BLOCKS, "decoder": {**tables["decoder"], "denoises": True}}
    plain, checkpointed = new_job("plain"), new_job("saved", gradient_checkpointing=True)
    for job in (plain, checkpointed):
        Trainer(job, silent()).run()
    assert_same_run(plain, checkpointed)


def test_bfloat16_passes_train_float32_parameters(new_job, silent, tables):
    tables |= {"objective": BLOCKS, "decoder": {**tables["decoder"], "denoises": True}}
    seen = []

    class Spy:
        def loss(self, *arguments):
            loss, figures = blocks.loss(*arguments)
            seen.append(torch.is_autocast_enabled("cpu"))
            return loss, figures

    job, report = new_job(precision="bfloat16", steps=40), silent()
    blocks = job.objective
    Trainer(attrs.evolve(job, objective=Spy()), report).run()
    assert set(seen) == {True}
    assert all(tensor.dtype == torch.float32 for tensor in tensors_of(job).values())
    assert report.losses["model", 40] < report.losses["model", 1] - 1


def test_scores_tell_of_masked_bytes_and_of_drafts(new_job, silent, tables):
    tables |= {"objective": BLOCKS, "decoder": {**tables["decoder"], "denoises": True}}
    job = new_job(steps=4, validate_every=4, valid_drafts=4)
    Trainer(job, silent()).run()
    (scores,) = (r for r in metrics(job.out) if r["phase"] == "model" and "bits_per_byte" in r)
    rates = [f"masked_accuracy/{rate}" for rate in (0.25, 0.5, 0.75, 1.0)]
    drafts = ["accepted/blt-s draft_bytes=16", "accepted/blt-dv block_bytes=4 start=aligned"]
    assert all(0 <= scores[name] <= 1 for name in (*rates, *drafts))


def test_events_of_tensorboard_tell_what_the_metrics_tell(new_job, silent):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def stop(phase, step):
        if (phase, step) == ("model", 7):
            raise KeyboardInterrupt

    job = new_job()
    with pytest.raises(KeyboardInterrupt):
        Trainer(job, silent(stop)).run()
    Trainer(new_job(), silent()).run()
    events = EventAccumulator(str(job.out / "tensorboard"))
    events.Reload()
    losses = {(r["phase"], r["step"]): r["loss"] for r in metrics(job.out) if "loss" in r}
    found = {
        (phase, event.step): event.value
        for phase in ("scorer", "model")
        for event in events.Scalars(f"{phase}/loss")
    }
    assert found == pytest.approx(losses, rel=1e-6)


# -- a scorer alone --------------------------------------------------------------------------------


def test_a_scorer_is_trained_alone_and_used_by_a_model(new_job, silent, tables, tmp_path):
    parts = {kind: tables.pop(kind) for kind in ("encoder", "global_model", "decoder")}
    alone = new_job("alone", steps=0, validate_every=4)
    result = Trainer(alone, silent()).run()
    scores = [r["bits_per_byte"] for r in metrics(alone.out) if "bits_per_byte" in r]
    assert len(scores) == 2
    assert result.best_bits_per_byte == scores[-1]
    config, scorer = stored(alone.out / "model")
    assert config["patcher"]["threshold"] == result.threshold > 0
    assert {name.split(".")[0] for name in scorer} == {"patcher"}

    def files() -> dict[Path, tuple[int, bytes]]:
        """What the run has written but for its plot, which is drawn again."""
        paths = [*alone.out.glob("model/*"), *alone.out.glob("state/*/*")]
        kept = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}
        return kept | {alone.out: (0, (alone.out / "metrics.jsonl").read_bytes())}

    write_threshold(str(alone.out / "model"), 1.25, load_plugins())  # blt calibrate --write
    before, report = files(), silent()
    again = Trainer(new_job("alone", steps=0, validate_every=4), report).run()
    assert again == attrs.evolve(result, held_out=None)
    assert report.notes[1:] == ["already finished (scorer step 8); --fresh trains anew"]
    assert files() == before
    write_threshold(str(alone.out / "model"), result.threshold, load_plugins())

    tables |= parts
    del tables["patcher"], tables["train"]["scorer"]
    given = {"checkpoint": str(alone.out / "model")}
    tables["train"]["scorer"] = {}
    job, report = new_job("model", scorer=given), silent()
    Trainer(job, report).run()
    assert {phase for phase, _ in report.losses} == {"model"}
    assert job.model.patcher.threshold == result.threshold
    ours = tensors_of(job)
    assert all(torch.equal(ours[name], tensor) for name, tensor in scorer.items())
    assert (
        len(
            Pipeline.from_config({"schema": 1, "run": {"checkpoint": str(job.out / "model")}})
            .generate("def ", max_new_bytes=4)
            .output
        )
        <= 4
    )


def test_steps_and_parts_of_a_model_go_together(new_job, tables):
    with pytest.raises(ConfigError, match=r"train\.steps: missing"):
        new_job(steps=0)
    for kind in ("encoder", "global_model", "decoder"):
        del tables[kind]
    with pytest.raises(ConfigError, match=r"train\.steps: a scorer is trained alone without"):
        new_job()
