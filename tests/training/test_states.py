"""The saved states of a run: exact, safe to interrupt, checked, and sure of their configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path

import attrs
import pytest
import torch

from blt_core.errors import CheckpointError, DataError
from blt_plugins.training.run.resume import OtherSettingsError, check_same_settings
from blt_plugins.training.run.states import States, TrainingState


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
