"""The saved state of a run: exact, safe to interrupt, and sure of its configuration."""

from __future__ import annotations

import re

import attrs
import pytest
import torch

from blt_core.errors import CheckpointError, DataError
from blt_plugins.training.state import (
    OtherSettingsError,
    TrainingState,
    check_same_settings,
    load_state,
    save_state,
)


def state(**keys) -> TrainingState:
    fields = {
        "phase": "model",
        "step": 3,
        "threshold": 0.1 + 0.2,
        "best": None,
        "settings": {"train": {"steps": 10, "rates": [1.0, 2.0]}},
        "model": {"decoder.head.weight": torch.randn(3, 2)},
        "optimizer": {"decoder.head.weight|step": torch.tensor(3.0)},
    }
    return TrainingState(**{**fields, **keys})


def test_what_was_saved_is_what_is_loaded(tmp_path):
    saved = state()
    save_state(tmp_path / "state", saved)
    loaded = load_state(tmp_path / "state")
    for name in ("phase", "step", "threshold", "best", "settings"):
        assert getattr(loaded, name) == getattr(saved, name)
    for group in ("model", "optimizer"):
        assert getattr(loaded, group).keys() == getattr(saved, group).keys()
        for name, tensor in getattr(saved, group).items():
            assert torch.equal(getattr(loaded, group)[name], tensor)
    assert torch.equal(loaded.generator, saved.generator)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == [
        "state.json",
        "tensors.safetensors",
    ]


def test_no_state_is_none(tmp_path):
    assert load_state(tmp_path / "state") is None


def test_a_write_that_fails_leaves_the_former_state(tmp_path):
    save_state(tmp_path / "state", state(step=1))
    with pytest.raises(TypeError):
        save_state(tmp_path / "state", state(step=2, best=object()))
    assert load_state(tmp_path / "state").step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_write_cut_short_between_its_renames_loses_nothing(tmp_path):
    save_state(tmp_path / "state", state(step=1))
    (tmp_path / "state").rename(tmp_path / ".state.old")
    assert load_state(tmp_path / "state").step == 1
    save_state(tmp_path / "state", state(step=2))
    assert load_state(tmp_path / "state").step == 2
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"cut"])
def test_a_damaged_state_says_so_and_what_to_do(tmp_path, file, content):
    save_state(tmp_path / "state", state())
    path = tmp_path / "state" / file
    path.write_bytes(path.read_bytes()[:40] if content == b"cut" else content)
    with pytest.raises(CheckpointError, match=r"training state is damaged .* --fresh"):
        load_state(tmp_path / "state")


@pytest.mark.parametrize("name", ["notes.txt", "state.json", "tensors.safetensors"])
def test_a_folder_that_is_no_state_is_neither_read_nor_replaced(tmp_path, name):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / name).write_text("mine")
    for use in (load_state, lambda folder: save_state(folder, state())):
        with pytest.raises(
            DataError, match="state: not replaced, since it is no folder with "
        ) as e:
            use(tmp_path / "state")
        assert "--fresh" not in str(e.value)
    assert [p.read_text() for p in (tmp_path / "state").iterdir()] == ["mine"]


def test_what_else_lies_beside_a_state_stays(tmp_path):
    save_state(tmp_path / "state", state(step=1))
    (tmp_path / "state" / "notes.txt").write_text("mine")
    save_state(tmp_path / "state", state(step=2))
    assert load_state(tmp_path / "state").step == 2
    assert (tmp_path / "state" / "notes.txt").read_text() == "mine"


def test_a_state_of_another_version_is_refused(tmp_path):
    save_state(tmp_path / "state", state())
    file = tmp_path / "state" / "state.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(CheckpointError, match=r"state version 7, this one reads 1"):
        load_state(tmp_path / "state")


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
