"""The saved states of a run: exact, safe to interrupt, checked, and sure of their configuration."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import attrs
import pytest
import torch

from blt_core.errors import CheckpointError, DataError
from blt_plugins.training.run import state_files
from blt_plugins.training.run.resume import OtherSettingsError, check_same_settings
from blt_plugins.training.run.state_files import TrainingState
from blt_plugins.training.run.states import States
from blt_plugins.training.run.together import Together
from tests.training.groups import Group, Member


def state(**keys) -> TrainingState:
    fields = {
        "phase": "model",
        "step": 3,
        "threshold": 0.1 + 0.2,
        "best": None,
        "settings": {"train": {"steps": 10, "rates": [1.0, 2.0]}},
        "rest": {"patcher.head.weight": torch.randn(3, 2)},
    }
    return TrainingState(**{**fields, **keys})


def states(tmp_path: Path, keep: int = 3) -> States:
    return States(tmp_path / "state", ("scorer", "model"), keep)


def save(of: States, saved: TrainingState, content: str = "weights") -> None:
    def write(folder: Path) -> None:
        (folder / "backend.txt").write_text(content)

    of.save(saved, write)


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "state").iterdir())


def test_what_was_saved_is_what_is_loaded(tmp_path):
    saved = state()
    save(states(tmp_path), saved)
    found = states(tmp_path).latest(pytest.fail)
    for name in ("phase", "step", "threshold", "best", "settings"):
        assert getattr(found.state, name) == getattr(saved, name)
    assert torch.equal(found.state.rest["patcher.head.weight"], saved.rest["patcher.head.weight"])
    assert torch.equal(found.state.generator, saved.generator)
    assert (found.folder / "backend.txt").read_text() == "weights"


# -- processes that check a state together -------------------------------------------------------


def save_parts(of: States, step: int, sizes: tuple[int, ...]) -> None:
    """A state of files of so many bytes."""

    def write(folder: Path) -> None:
        for number, size in enumerate(sizes):
            (folder / f"part-{number}").write_bytes(bytes(size))

    of.save(state(step=step), write)


def found_by(tmp_path: Path, processes: int) -> list[tuple[object, list[str]]]:
    """What each process goes on from, or raises, and what it was warned of."""

    def one(backend: Member) -> tuple[object, list[str]]:
        together, said = Together(backend, lambda: False, "start"), []
        try:
            found = states(tmp_path).latest(
                said.append, rank=backend.rank, processes=processes, tell=together.tell
            )
        except CheckpointError as error:
            return str(error), said
        return found and found.state.step, said

    return Group(processes).run(one)


@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_checks_a_share_and_no_file_is_checked_twice(tmp_path, monkeypatch, processes):
    sizes = (9000, 5000, 4000, 3000, 100)
    save_parts(states(tmp_path), 3, sizes)
    checked: dict[int, list[str]] = {}
    inner = state_files._checksum

    def noting(path: Path) -> int:
        checked.setdefault(threading.get_ident(), []).append(path.name)
        return inner(path)

    monkeypatch.setattr(state_files, "_checksum", noting)
    assert found_by(tmp_path, processes) == [(3, [])] * processes
    names = [name for share in checked.values() for name in share]
    assert sorted(names) == [*(f"part-{n}" for n in range(5)), "rest.safetensors"]
    folder = tmp_path / "state" / "model-00000003"
    loads = [sum((folder / name).stat().st_size for name in share) for share in checked.values()]
    assert len(loads) == processes
    assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.parametrize("name", ["part-0", "part-1", "part-2", "rest.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_damage_that_one_process_finds_has_all_take_the_state_before(tmp_path, name, damage):
    own = states(tmp_path)
    save_parts(own, 1, (90, 80, 70))
    save_parts(own, 2, (90, 80, 70))
    folder = tmp_path / "state" / "model-00000002"
    DAMAGE[damage](folder / name)
    first, *others = found_by(tmp_path, 3)
    assert others == [first] * 2
    step, (warning,) = first
    assert step == 1
    assert warning.startswith(f"warning: {folder}: this state is damaged (")
    if name != "state.json":  # which may be no text any more
        assert name in warning
    DAMAGE[damage](tmp_path / "state" / "model-00000001" / "part-1")
    first, *others = found_by(tmp_path, 3)
    assert others == [first] * 2
    error, warnings = first
    told = [f"warning: {line}; looking for the one before it" for line in error.splitlines()[:2]]
    assert warnings == told
    assert error.splitlines()[2:] == ["  fix: start anew with --fresh"]


def test_processes_without_a_state_and_with_one_of_another_version_do_not_wait(tmp_path):
    assert found_by(tmp_path, 2) == [(None, [])] * 2
    save_parts(states(tmp_path), 3, (9,))
    file = tmp_path / "state" / "model-00000003" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 7}))
    for error, said in found_by(tmp_path, 2):
        assert "state version 7, this one reads" in error
        assert said == []


def test_a_process_that_cannot_read_what_others_can_stops_none_of_them(tmp_path, monkeypatch):
    own = states(tmp_path)
    save_parts(own, 1, (9,))
    save_parts(own, 2, (9,))
    inner = state_files.load_file

    def failing(path: Path):
        if threading.current_thread().name.endswith("1") and "00000002" in str(path):
            raise OSError("Stale file handle")
        return inner(path)

    monkeypatch.setattr(state_files, "load_file", failing)
    for step, (warning,) in found_by(tmp_path, 2):
        assert step == 1
        assert "this state is damaged (Stale file handle)" in warning


# -- a state of one process ----------------------------------------------------------------------


def test_no_state_is_none(tmp_path):
    assert states(tmp_path).latest(pytest.fail) is None


def test_the_last_ones_are_kept_in_the_order_of_the_run(tmp_path):
    own = states(tmp_path, keep=2)
    for phase, step in (("scorer", 5), ("scorer", 50), ("model", 0), ("model", 7)):
        save(own, state(phase=phase, step=step))
    assert names(tmp_path) == ["model-00000000", "model-00000007"]
    assert own.latest(pytest.fail).state.name == "model step 7"
    own.clear()
    assert names(tmp_path) == []


def test_a_kill_while_a_state_of_the_same_step_takes_its_place_loses_nothing(tmp_path, monkeypatch):
    of = states(tmp_path, keep=1)
    save(of, state(scored=False), "first")
    rename = Path.rename

    def killed(path, target):
        if ".new-" in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save(of, state(), "second")
    monkeypatch.undo()
    assert names(tmp_path) == [".model-00000003.former", ".model-00000003.new-0"]
    found = states(tmp_path, keep=1).latest(pytest.fail)
    assert (found.folder / "backend.txt").read_text() == "first"
    save(states(tmp_path, keep=1), state(), "third")
    assert names(tmp_path) == ["model-00000003"]
    found = states(tmp_path, keep=1).latest(pytest.fail)
    assert (found.folder / "backend.txt").read_text() == "third"


@pytest.mark.parametrize("what", [TypeError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_former_state(tmp_path, what):
    own = states(tmp_path)
    save(own, state(step=1))

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise what

    with pytest.raises(what):
        own.save(state(step=2), fail)
    assert states(tmp_path).latest(pytest.fail).state.step == 1
    save(states(tmp_path), state(step=2))  # what was left behind is cleared away
    assert names(tmp_path) == ["model-00000001", "model-00000002"]


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x99"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("file", ["state.json", "rest.safetensors", "backend.txt"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_state_is_passed_over_with_a_warning(tmp_path, file, damage):
    own = states(tmp_path, keep=2)
    save(own, state(step=1))
    save(own, state(step=2))
    DAMAGE[damage](tmp_path / "state" / "model-00000002" / file)
    said: list[str] = []
    assert states(tmp_path).latest(said.append).state.step == 1
    (warning,) = said
    assert re.match(r"warning: .*model-00000002: this state is damaged", warning)
    # Its place is taken by what the run does next, and it never displaces a good one.
    save(own, state(step=2))
    assert own.latest(pytest.fail).state.step == 2
    DAMAGE[damage](tmp_path / "state" / "model-00000002" / file)
    lone = states(tmp_path, keep=1)
    save(lone, state(step=1))
    assert names(tmp_path) == ["model-00000001"]
    DAMAGE[damage](tmp_path / "state" / "model-00000001" / file)
    with pytest.raises(CheckpointError, match=r"this state is damaged .*\n.*--fresh"):
        lone.latest(said.append)


@pytest.mark.parametrize("name", ["notes.txt", "model-1", "model-00000001"])
def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / name).write_text("mine")
    with pytest.raises(DataError, match=rf"state: holds '{name}', which is no state of a run"):
        states(tmp_path)
    assert (tmp_path / "state" / name).read_text() == "mine"


def test_strays_are_passed_over_and_left_alone(tmp_path):
    save(states(tmp_path), state())
    strays = [".DS_Store", "._model-00000003", "Thumbs.db", ".nfs0001", "notes.txt~"]
    for name in strays:
        (tmp_path / "state" / name).write_text("mine")
    own = states(tmp_path)
    own.tidy()
    assert own.latest(pytest.fail).state.step == 3
    assert names(tmp_path) == sorted([*strays, "model-00000003"])


def test_strays_that_come_while_a_state_is_written_may_go(tmp_path):
    own = states(tmp_path)

    def write(folder: Path) -> None:
        (folder / "._backend.txt").write_text("dross")

    own.save(state(), write)
    (tmp_path / "state" / "model-00000003" / "._backend.txt").unlink()
    assert own.latest(pytest.fail).state.step == 3


@pytest.mark.parametrize("text", ["[" * 100_000, '{"version": ' + "9" * 5000 + "}"])
def test_a_description_beyond_the_limits_of_python_is_damage(tmp_path, text):
    own = states(tmp_path)
    save(own, state(step=1))
    save(own, state(step=2))
    (tmp_path / "state" / "model-00000002" / "state.json").write_text(text)
    said: list[str] = []
    assert own.latest(said.append).state.step == 1
    assert "this state is damaged (not read: " in said[0]


def test_a_state_of_another_version_is_refused(tmp_path):
    save(states(tmp_path), state())
    file = tmp_path / "state" / "model-00000003" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 7}))
    with pytest.raises(CheckpointError, match=r"state version 7, this one reads \d"):
        states(tmp_path).latest(pytest.fail)
    file.rename(tmp_path / "state" / "state.json")  # where version 1 had it
    with pytest.raises(DataError, match="another version"):
        states(tmp_path)


def test_settings_that_differ_are_all_named(tmp_path):
    saved = attrs.evolve(state(), settings={"train": {"steps": 10}, "model": {"a": 1, "b": 2}})
    check_same_settings(tmp_path, saved, {"train": {"steps": 10}, "model": {"a": 1, "b": 2}})
    with pytest.raises(OtherSettingsError) as caught:
        check_same_settings(tmp_path, saved, {"train": {"steps": 20}, "model": {"a": 1, "c": 3}})
    text = str(caught.value)
    assert re.search(r"train\.steps: 10 there, 20 now", text)
    assert re.search(r"model\.b: 2 there, not set now", text)
    assert re.search(r"model\.c: not set there, 3 now", text)
    assert "model.a" not in text
    assert caught.value.exit_code == 2
