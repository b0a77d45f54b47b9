"""States that processes write a part of each: whole or not there, whoever dies and wherever."""

from __future__ import annotations

import json
import random
import shutil
from itertools import cycle, pairwise
from pathlib import Path

import pytest
import tomli_w
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from blt_core.errors import CheckpointError
from blt_core.loading import read_checkpoint
from blt_core.plugins.loading import load_plugins
from blt_plugins.training.backends.saving import PART, Stored
from tests.nightly import nightly_or

#: ``blt``, whose processes wait 20 seconds for one another. Those of DYING die SECONDS after they
#: have taken STEPS steps, or have met for 0; the others tell how long they went on.
#: FULL, a rank and a step: that process cannot write a file of this step's state to its end.
#: SLOW: the most seconds that each part of a state takes longer to be written in the background.
PROGRAM = """
import datetime, os, random, resource, signal, sys, threading, time
import torch.distributed
from blt_core.cli import main
from blt_plugins.training.backends import saving
from blt_plugins.training.backends.torch import TorchBackend

rank, init, began = os.environ["RANK"], torch.distributed.init_process_group, []
own_step, steps, pids = TorchBackend.step, 0, [None, None]

def kill():  # all of them at once: those that are left would end by themselves
    for other in os.environ["DYING"].replace(rank, "") + rank:
        os.kill(pids[int(other)], signal.SIGKILL)

def die_after(done):
    if os.environ.get("DYING", " ").startswith(rank) and done == int(os.environ["STEPS"]):
        die = threading.Timer(float(os.environ["SECONDS"]), kill)
        die.daemon = True
        die.start()

def meet(*names):
    init(*names, timeout=datetime.timedelta(seconds=20))
    torch.distributed.all_gather_object(pids, os.getpid())
    began.append(time.monotonic())
    die_after(0)

def step(self, learning_rate):
    global steps
    steps += 1
    norm = own_step(self, learning_rate)
    die_after(steps)
    return norm

torch.distributed.init_process_group = meet
TorchBackend.step = step
full = os.environ.get("FULL", "")
own_write, slow = saving.write, float(os.environ.get("SLOW", 0))

def write(folder, part, **keys):
    if full == f"{rank} {folder.name.split('.')[1]}":
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    if threading.current_thread() is not threading.main_thread():
        time.sleep(random.uniform(0, slow))
    return own_write(folder, part, **keys)

saving.write = write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    main()
finally:
    if began:
        print("seconds:", time.monotonic() - began[0], file=sys.stderr)
"""


#: Of five times, how often a run has to be killed, rather than end before its moment comes.
KILLED = nightly_or(3, 4)


# -- rows in files -------------------------------------------------------------------------------


@given(
    rows=st.integers(0, 9),
    cuts=st.lists(st.integers(0, 9), max_size=3),
    wanted=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_any_rows_are_read_from_any_files(tmp_path_factory, rows, cuts, wanted):
    folder, whole = tmp_path_factory.mktemp("rows"), torch.arange(2.0 * rows).view(rows, 2)
    places = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    runs = list(pairwise(places)) or [(0, 0)]
    for number, (first, last) in enumerate(runs):
        metadata = {"first_rows": json.dumps({"x": first})}
        path = folder / PART.format(number, len(runs))
        save_file({"x": whole[first:last].clone(), "n": torch.tensor(3)}, path, metadata)
    first, last = sorted(min(place, rows) for place in wanted)
    stored = Stored(sorted(folder.iterdir()))
    assert stored.shape("x") == (rows, 2)
    assert stored.rows("x", whole, first, whole[first:last]).equal(whole[first:last])
    assert stored.number("n") == 3


def test_rows_that_no_file_has_and_other_shapes_are_named(tmp_path):
    for number, first in enumerate((0, 6)):
        metadata = {"first_rows": json.dumps({"x": first})}
        save_file({"x": torch.ones(2, 3)}, tmp_path / PART.format(number, 2), metadata)
    stored, own = Stored(sorted(tmp_path.iterdir())), torch.ones(8, 3)
    assert stored.rows("x", own, 6, own[6:]).equal(own[6:])
    with pytest.raises(CheckpointError, match="no file has row 2 of x"):
        stored.rows("x", own, 1, own[1:])
    with pytest.raises(CheckpointError, match=r"x has shape \(8, 3\), not \(9, 3\)"):
        stored.rows("x", torch.ones(9, 3), 0, own)


# -- runs of two processes -----------------------------------------------------------------------


class Run:
    """A run of two processes, whose weights are spread, and which saves after each step."""

    def __init__(self, folder: Path, tables, forks) -> None:
        self.folder, self._forks = folder, forks
        few = {"steps": 6, "validate_every": 3, "valid_drafts": 0, "checkpoint_every": 1}
        scorer = {**tables["train"]["scorer"], "steps": 3}
        train = {**tables["train"], "accumulate": 2, "scorer": scorer, **few}
        backend = {"use": "torch", "strategy": "fsdp"}
        tables = {**tables, "training_backend": backend, "train": train}
        (folder / "program.py").write_text(PROGRAM)
        for background in (False, True):
            tables["train"] = {**train, "async_states": background}
            self._config(background=background).write_text(tomli_w.dumps(tables))

    def __call__(self, out: Path, *, background: bool = False, **env: str):
        config = self._config(background=background)
        program = [str(self.folder / "program.py"), "train", str(config)]
        return self._forks.run(2, [*program, "--out", str(out)], env)

    def _config(self, *, background: bool) -> Path:
        return self.folder / f"config-{background}.toml"


def made(out: Path):
    """What a finished run has logged, but for its speed, and the tensors of its model."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    _, tensors = read_checkpoint(str(out / "model"), load_plugins())
    logged = [{k: v for k, v in record.items() if k != "bytes_per_second"} for record in records]
    return logged, {name: tensors[name].tolist() for name in tensors}


@pytest.fixture(scope="module")
def run(lasting_tables, tmp_path_factory, forks) -> Run:
    return Run(tmp_path_factory.mktemp("sharded"), lasting_tables, forks)


@pytest.fixture(scope="module")
def whole(run) -> tuple[Path, float]:
    """The folder of a run that nothing has stopped, and its seconds from the meeting on."""
    ended = run(run.folder / "whole")
    assert ended.returncode == 0, ended.stderr
    return run.folder / "whole", float(ended.stderr.split("seconds:")[1].split()[0])


@pytest.mark.slow
def test_each_process_writes_what_it_keeps(whole):
    [folder] = (whole[0] / "state").glob("model-*6")
    files = [folder / PART.format(rank, 2) for rank in range(2)]
    assert sorted(folder.glob("training*")) == files
    assert not list(folder.glob("sums-*"))
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) < 1.1 * min(sizes)
    stored = Stored(files)
    table = stored["weight/encoder.ngrams.table.weight"]
    assert [(each.first, each.path) for each in table] == [(0, files[0]), (25, files[1])]


@pytest.mark.slow
@pytest.mark.parametrize(
    "background",
    [
        pytest.param((False, True), id="in turns"),
        pytest.param((True,), id="async", marks=pytest.mark.nightly(reason="in turns, both are")),
    ],
)
@pytest.mark.parametrize("seed", range(nightly_or(1, 10)))
def test_a_run_whose_processes_are_killed_goes_on_bit_for_bit(
    run, whole, tmp_path, seed, background
):
    """Five times, at random moments: one process, the other, or both.

    Each within a tenth of the run, so that there is more of it to be killed in.
    """
    out, draw, killed = tmp_path / "out", random.Random(seed), 0
    for dying, own in zip(("0", "1", "01", "0", "1"), cycle(background), strict=False):
        moment = {"STEPS": str(draw.randrange(2)), "SECONDS": str(draw.uniform(0, whole[1] / 10))}
        ended = run(out, background=own, DYING=dying, SLOW="0.2", **moment)
        if -9 in ended.codes:
            killed += 1
            assert 0 not in ended.codes
            assert ended.codes.count(-9) == len(dying)
            if "Traceback" in ended.stderr:
                pytest.fail(ended.stderr)
    assert killed >= KILLED
    assert run(out, background=background[-1]).returncode == 0
    assert made(out) == made(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "background",
    [
        pytest.param(False, marks=pytest.mark.nightly(reason="test_resume.py fails such a write")),
        True,
    ],
)
def test_a_process_that_cannot_write_stops_the_run_and_the_state_before_is_gone_on_from(
    run, whole, tmp_path, background
):
    out = tmp_path / "out"
    ended = run(out, background=background, FULL="1 model-00000004")
    assert ended.codes == [1, 1]
    assert "File too large" in ended.stderr
    if background:
        assert "state of model step 4: failed in process 1 of 2" in ended.stderr
    else:
        assert "another process could not write its part of the state" in ended.stderr
    assert not [path for path in (out / "state").iterdir() if path.name.startswith(".")]
    ended = run(out)
    assert "resumed at model step 3" in ended.stderr
    assert made(out) == made(whole[0])


@pytest.mark.slow
def test_a_part_that_is_missing_is_named(run, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "out")
    states = sorted((tmp_path / "out" / "state").glob("model-*"))
    for folder in states:
        (folder / PART.format(1, 2)).unlink()
    ended = run(tmp_path / "out")
    assert ended.codes == [2, 2]
    for folder in states:
        assert f"{folder}: this state is damaged" in ended.stderr
        assert str(folder / PART.format(1, 2)) in ended.stderr
    assert "start anew with --fresh" in ended.stderr
