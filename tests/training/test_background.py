"""States that are written while training goes on: the same ones, and none of them by halves."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blt_core.errors import ConfigError, RunError
from blt_core.plugins.loading import load_plugins
from blt_core.wiring.config import Config
from blt_plugins.training.backends import saving
from blt_plugins.training.backends.parameters import parameter_groups
from blt_plugins.training.backends.saving import Staging
from blt_plugins.training.objectives.losses import MODEL
from blt_plugins.training.planning.plan import Planner, full_batch, traced_phases
from blt_plugins.training.run.background import BackgroundStates
from blt_plugins.training.run.job import Job
from blt_plugins.training.run.make_job import make_job
from blt_plugins.training.run.report import SilentReport
from blt_plugins.training.run.state_files import TrainingState
from blt_plugins.training.run.states import States
from blt_plugins.training.run.together import OtherProcessError, Together
from blt_plugins.training.run.trainer import Trainer
from blt_plugins.training.setup.config import check_saves, plan_training
from tests.training.groups import SECONDS, Group, Member
from tests.training.runs import assert_same_run


@pytest.fixture(scope="module")
def whole(lasting_tables, tmp_path_factory) -> Job:
    """A job that has kept all of its states, each written before the next step."""
    tables = {**lasting_tables, "train": {**lasting_tables["train"], "keep_states": 9}}
    config = Config.from_mapping(tables, "tiny.toml")
    job = make_job(config, load_plugins(), out=tmp_path_factory.mktemp("whole"))
    Trainer(job, SilentReport()).run()
    return job


def states_of(job: Job) -> dict[str, bytes]:
    folder = job.out / "state"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("blt-states")]


@pytest.fixture
def held(monkeypatch) -> Callable[[str, threading.Event], None]:
    """Has the write of one state wait for an event."""

    def hold(name: str, until: threading.Event) -> None:
        inner = saving.write

        def waiting(folder: Path, *given, **keys):
            if name in folder.name:
                assert threading.current_thread() is not threading.main_thread()
                assert until.wait(SECONDS)
            return inner(folder, *given, **keys)

        monkeypatch.setattr(saving, "write", waiting)

    return hold


# -- runs of one process -------------------------------------------------------------------------


def test_the_states_are_those_of_a_run_that_waits_for_them_and_so_is_the_run(
    whole, new_job, silent
):
    job = new_job(keep_states=9, async_states=True)
    Trainer(job, silent()).run()
    assert_same_run(whole, job)
    assert states_of(job) == states_of(whole)
    assert threads() == []


def test_training_goes_on_while_a_state_is_written_and_the_next_one_waits(
    whole, new_job, silent, held
):
    written, seen = threading.Event(), []
    held("model-00000005", written)
    job = new_job(keep_states=9, async_states=True)

    def at_step(phase: str, step: int) -> None:
        if phase == "model":
            seen.append((step, (job.out / "state" / "model-00000005").exists()))
            if step == 8:
                written.set()

    Trainer(job, silent(at_step)).run()
    assert [there for step, there in seen if 5 <= step <= 8] == [False] * 4
    assert seen[-1] == (12, True)
    assert_same_run(whole, job)
    assert states_of(job) == states_of(whole)


def test_a_write_that_fails_stops_the_run_with_its_error_and_the_state_before_is_gone_on_from(
    whole, new_job, silent, monkeypatch
):
    inner, failing = saving.write, [True]

    def full(folder: Path, *given, **keys):
        if failing and "model-00000005" in folder.name:
            (folder / "half").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return inner(folder, *given, **keys)

    monkeypatch.setattr(saving, "write", full)
    report = silent()
    with pytest.raises(RunError, match=r"model-00000005\.new-0: No space left on device"):
        Trainer(new_job("part", async_states=True), report).run()
    assert max(step for phase, step in report.losses if phase == "model") < 10
    state = new_job("part").out / "state"
    assert min(path.name for path in state.iterdir()) == "model-00000000"
    assert threads() == []
    failing.clear()
    again, report = new_job("part", async_states=True), silent()
    Trainer(again, report).run()
    assert "resumed at model step 0" in report.notes
    assert_same_run(whole, again)


def test_a_run_that_fails_completes_the_state_that_is_being_written(whole, new_job, silent, held):
    written = threading.Event()
    held("model-00000005", written)

    def fail(*now: object) -> None:
        if now == ("model", 7):
            written.set()
            raise ValueError("out of luck")

    with pytest.raises(ValueError, match="out of luck"):
        Trainer(new_job("part", async_states=True), silent(fail)).run()
    assert threads() == []
    again, report = new_job("part", async_states=True), silent()
    Trainer(again, report).run()
    assert "resumed at model step 5" in report.notes
    assert_same_run(whole, again)


def test_a_loss_that_is_no_number_names_the_state_that_was_being_written(
    new_job, silent, held, monkeypatch
):
    written = threading.Event()
    held("model-00000005", written)
    job = new_job(async_states=True, keep_states=1)
    trainer = Trainer(job, silent())
    check = trainer._judge.check_finite

    def failing(what, value, phase, step):
        here = (phase.name, step) == ("model", 6)
        if here:
            written.set()
        check(what, float("nan") if here else value, phase, step)

    monkeypatch.setattr(trainer._judge, "check_finite", failing)
    folder = job.out / "state" / "model-00000005"
    with pytest.raises(RunError, match=r"the last good state is .*") as error:
        trainer.run()
    assert str(folder) in str(error.value)
    assert folder.is_dir()


def test_a_backend_that_cannot_copy_its_state_is_refused_with_what_to_do(tables):
    def check(*, wanted: bool) -> None:
        tables["train"]["async_states"] = wanted
        config = Config.from_mapping(tables, "tiny.toml")
        training = plan_training(config, load_plugins())
        check_saves(training.plan, training.settings, object())

    check(wanted=False)
    with pytest.raises(
        ConfigError, match=r"train\.async_states: .* cannot copy its state"
    ) as error:
        check(wanted=True)
    assert "remove this key, or set training_backend.use = 'torch'" in str(error.value)


def test_a_safetensors_that_stops_training_while_it_writes_is_refused(tables, monkeypatch):
    tables["train"]["async_states"] = True
    training = plan_training(Config.from_mapping(tables, "tiny.toml"), load_plugins())
    backend = training.plan.build("training_backend")
    check_saves(training.plan, training.settings, backend)
    monkeypatch.setattr("blt_plugins.training.setup.config.metadata.version", lambda _: "0.7.1")
    with pytest.raises(ConfigError, match=r"safetensors 0\.7\.1 lets nothing else run"):
        check_saves(training.plan, training.settings, backend)


# -- several processes ---------------------------------------------------------------------------


class Writes:
    """What two processes write; ``may`` holds each back, and ``broken`` has it fail."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder, self.saved = tmp_path / "state", {0: [], 1: []}
        self.may, self.broken = [threading.Event(), threading.Event()], set()

    def of(self, backend: Member) -> tuple[BackgroundStates, Callable[[int], None]]:
        """Those of one process, and what begins to save a step."""
        rank = backend.rank
        states = States(self.folder, ("model",), 3)
        background = BackgroundStates(states, rank, 2, self.saved[rank].append)
        together = Together(backend, lambda: False, "state")

        def write(folder: Path) -> list[Path]:
            assert self.may[rank].wait(SECONDS)
            if rank in self.broken:
                raise OSError(errno.EIO, "Input/output error")
            path = folder / f"part-{rank}"
            path.write_bytes(bytes(100 + rank))
            return [path]

        def begin(step: int) -> None:
            state = TrainingState(
                phase="model", step=step, threshold=None, best=None, settings={}, rest={}
            )
            background.save(state, lambda: write, lambda failed: together.agree(failed=failed))

        return background, begin


def step(background: BackgroundStates, backend: Member) -> None:
    """What a step of a run tells and hears."""
    background.heard(backend.mean(background.news()))


def test_a_state_counts_once_all_processes_are_done_and_not_before(tmp_path):
    writes = Writes(tmp_path)
    writes.may[1].set()

    def one(backend: Member) -> list[bool]:
        background, begin = writes.of(backend)
        begin(4)
        seen = []
        for number in range(3):
            step(background, backend)
            seen.append((writes.folder / "model-00000004").exists())
            if number == 2 and backend.rank == 0:
                writes.may[0].set()
        background.finish()
        assert background.news() == [0.0, 0.0]
        background.close()
        return seen

    assert Group(2).run(one) == [[False] * 3] * 2
    folder = writes.folder / "model-00000004"
    assert writes.saved == {0: [folder], 1: [folder]}
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["part-0", "part-1", "rest.safetensors", "state.json"]
    assert States(writes.folder, ("model",), 3).latest(pytest.fail).state.step == 4


@pytest.mark.parametrize("asked", ["at a step", "at the next save"])
def test_a_write_that_fails_in_one_process_ends_in_all_and_leaves_nothing(tmp_path, asked):
    writes = Writes(tmp_path)
    writes.broken.add(1)
    for may in writes.may:
        may.set()

    def one(backend: Member) -> Exception:
        background, begin = writes.of(backend)
        begin(4)
        try:
            while asked == "at a step":
                step(background, backend)
            begin(5)
        finally:
            background.close()

    first, second = Group(2).run(one)
    assert isinstance(first, OtherProcessError)
    assert "state: failed in process 1 of 2 (counted from 0)" in str(first)
    assert isinstance(second, RunError)
    assert "Input/output error" in str(second)
    assert list(writes.folder.iterdir()) == []
    assert threads() == []


def test_a_run_that_ends_by_an_error_leaves_no_half_of_a_state(tmp_path):
    writes = Writes(tmp_path)
    for may in writes.may:
        may.set()

    def one(backend: Member) -> None:
        background, begin = writes.of(backend)
        begin(4)
        if backend.rank == 1:
            background.close()
        backend.mean([])
        if backend.rank == 0:
            background.close()

    assert Group(2).run(one) == [None, None]
    assert list(writes.folder.iterdir()) == []
    assert threads() == []


# -- staging -------------------------------------------------------------------------------------


def test_copies_are_whole_apart_from_what_they_are_of_and_their_memory_is_used_again():
    staging, of = Staging(), {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.tensor(3)}
    first = staging.copy(of)
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    assert all(first[name].equal(of[name]) for name in of)
    assert all(tensor.is_contiguous() for tensor in first.values())
    of["a"].zero_()
    assert first["a"].sum() == 15
    again = staging.copy(of)
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == places
    assert again["a"].sum() == 0
    assert staging.copy({"a": torch.ones(4)})["a"].shape == (4,)


def test_what_is_staged_is_what_the_plan_says(tables):
    tables["train"] |= {"async_states": True, "scorer": {"steps": 0}}
    config = Config.from_mapping(tables, "tiny.toml")
    planned = Planner(config, load_plugins()).plan(1).phases[-1].state.host.staging
    job = make_job(config, load_plugins())
    training = plan_training(config, load_plugins())
    phase = next(p for p in traced_phases(job.model, training) if p.name == MODEL)
    called = job.backend.start(
        phase.loss, parameter_groups(phase.loss, 0.1), clip=1.0, accumulate=1
    )
    batch = full_batch(job.model, job.settings, phase.step_bytes)
    job.backend.backward([lambda: called(batch, torch.Generator().manual_seed(0))[0]])
    job.backend.step(1e-3)
    job.backend.stage()
    kept = sum(tensor.nbytes for tensor in job.backend._staging._kept.values())
    scorer = sum(p.nbytes for p in job.model.patcher.parameters())
    assert kept + scorer == pytest.approx(planned, rel=0.01)
