"""The checkpoint folder: what is written is what is read, or a message says what is wrong."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from blt_core.component import BuildContext
from blt_core.errors import CheckpointError, DataError, RunError
from blt_core.loading import build_model, plan_run
from blt_core.plugins.loading import load_plugins
from blt_core.storage.folders import MODEL_FILES, current_folder, replace_folder
from blt_core.storage.tensors import load_tensors, model_config, model_tensors
from blt_core.wiring.config import Config
from blt_plugins.checkpoints.folder import FolderFormat, FolderFormatParams

CONFIG = {"schema": 1, "model": {"context_bytes": 9}, "patcher": {"use": "static", "none": None}}
TENSORS = {"decoder.a": torch.arange(6.0).reshape(2, 3), "decoder.b": torch.ones(2).bfloat16()}


@pytest.fixture
def folder() -> FolderFormat:
    return FolderFormat(FolderFormatParams(), BuildContext())


@pytest.fixture
def written(folder, tmp_path):
    folder.write(tmp_path / "model", CONFIG, TENSORS)
    return tmp_path / "model"


def test_config_and_tensors_come_back_as_they_were(folder, written):
    config, tensors = folder.read(str(written))
    assert config == {**CONFIG, "patcher": {"use": "static"}}
    assert sorted(tensors) == sorted(TENSORS)
    assert len(tensors) == 2
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert "decoder.c" not in tensors


def test_files_are_as_readable_as_the_folder_they_are_in(written):
    modes = {stat.S_IMODE(path.stat().st_mode) for path in written.iterdir()}
    assert modes == {stat.S_IMODE(written.stat().st_mode) & 0o666}


def test_writing_again_replaces_both_files_and_leaves_nothing_behind(folder, written):
    folder.write(written, {"schema": 2}, {"x": torch.ones(1)})
    config, tensors = folder.read(str(written))
    assert config == {"schema": 2}
    assert list(tensors) == ["x"]
    assert [path.name for path in written.parent.iterdir()] == ["model"]
    assert sorted(path.name for path in written.iterdir()) == ["config.toml", "model.safetensors"]


def test_a_config_with_a_byte_order_mark_is_read(folder, written):
    text = (written / "config.toml").read_text()
    (written / "config.toml").write_text(text, encoding="utf-8-sig")
    assert folder.read(str(written))[0]["schema"] == 1


@pytest.mark.parametrize("name", ["config.toml", "model.safetensors"])
def test_a_pointer_in_place_of_a_file_is_named(folder, written, name):
    (written / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(CheckpointError, match=rf"{name}: a Git-LFS pointer, .*git lfs pull"):
        folder.read(str(written))


def test_a_folder_of_nothing_but_strays_is_empty_and_they_stay(folder, tmp_path):
    (tmp_path / "model").mkdir()
    for name in (".DS_Store", "notes.txt~", ".nfs0001"):
        (tmp_path / "model" / name).write_text("mine")
    folder.write(tmp_path / "model", CONFIG, TENSORS)
    left = {path.name for path in (tmp_path / "model").iterdir()}
    assert left == {*MODEL_FILES, ".DS_Store", "notes.txt~"}


def test_what_else_lies_in_the_folder_stays(folder, written):
    (written / "README.md").write_text("a model card")
    (written / "plots" / "deep").mkdir(parents=True)
    (written / "plots" / "deep" / "loss.svg").write_text("<svg/>")
    (written / "link").symlink_to("nowhere")
    folder.write(written, {"schema": 2}, TENSORS)
    assert folder.read(str(written))[0] == {"schema": 2}
    assert (written / "README.md").read_text() == "a model card"
    assert (written / "plots" / "deep" / "loss.svg").read_text() == "<svg/>"
    assert (written / "link").readlink() == Path("nowhere")
    assert [path.name for path in written.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["net.py", "config.toml", "model.safetensors"])
@pytest.mark.parametrize("where", ["model", ".model.old"])
def test_a_folder_that_is_no_checkpoint_is_never_replaced(folder, tmp_path, name, where):
    (tmp_path / where).mkdir()
    (tmp_path / where / name).write_text("mine")
    text = f"{where}: not replaced, since it is no folder with config.toml and model.safetensors"
    with pytest.raises(DataError, match=re.escape(text)):
        folder.write(tmp_path / "model", CONFIG, TENSORS)
    assert (tmp_path / where / name).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [where]


def test_a_file_is_never_replaced_by_a_folder_but_an_empty_folder_is(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="file: Not a directory"):
        folder.write(tmp_path / "file", CONFIG, TENSORS)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    folder.write(tmp_path / "empty", CONFIG, TENSORS)
    assert folder.read(str(tmp_path / "empty"))[0]["schema"] == 1


def test_a_link_stays_a_link_and_what_it_leads_to_is_replaced(folder, written, tmp_path):
    (tmp_path / "link").symlink_to("model")
    folder.write(tmp_path / "link", {"schema": 2}, TENSORS)
    assert (tmp_path / "link").is_symlink()
    assert folder.read(str(written))[0] == {"schema": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model"]


@pytest.mark.parametrize("path", [".", "", "..", "/"])
def test_paths_without_a_name_are_as_good_as_any(folder, written, monkeypatch, path):
    (written / "below").mkdir()
    monkeypatch.chdir(written / "below" if path == ".." else written)
    assert folder.recognises(path) is (path != "/")
    if path == "/":
        with pytest.raises(DataError, match=r"^/: not replaced"):
            folder.write(Path(path), CONFIG, TENSORS)
    else:
        folder.write(Path(path), {"schema": 2}, TENSORS)
        assert folder.read(str(written))[0] == {"schema": 2}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_disk_that_is_full_is_told_with_the_path(folder, written, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("blt_plugins.checkpoints.folder.save_file", fail)
    text = re.escape(f"{written}: No space left on device")
    with pytest.raises(RunError, match=text) as caught:
        folder.write(written, {"schema": 2}, TENSORS)
    assert caught.value.exit_code == 1
    assert folder.read(str(written))[0]["schema"] == 1
    assert [path.name for path in written.parent.iterdir()] == ["model"]


def test_a_path_that_the_system_refuses_is_told():
    with pytest.raises(DataError, match="File name too long"):
        current_folder(Path("x" * 300))


def test_a_write_that_fails_leaves_the_old_checkpoint(folder, written):
    with pytest.raises(TypeError):
        folder.write(written, {"schema": object()}, TENSORS)
    assert folder.read(str(written))[0]["schema"] == 1
    with pytest.raises(KeyboardInterrupt), replace_folder(written, MODEL_FILES):
        raise KeyboardInterrupt
    assert folder.read(str(written))[0]["schema"] == 1
    assert [path.name for path in written.parent.iterdir()] == ["model"]


def test_a_replacement_cut_short_between_its_renames_shows_the_old_checkpoint(folder, written):
    written.rename(written.with_name(".model.old"))
    assert folder.recognises(str(written))
    config, tensors = folder.read(str(written))
    assert config["schema"] == 1
    assert torch.equal(tensors["decoder.a"], TENSORS["decoder.a"])


def test_tensors_read_before_a_replacement_stay_what_they_were(folder, written):
    _, old = folder.read(str(written))
    folder.write(written, CONFIG, {"decoder.a": torch.zeros(2, 3)})
    assert torch.equal(old["decoder.a"], TENSORS["decoder.a"])


def test_folders_are_recognised_by_either_file_and_other_schemes_are_not(folder, written, tmp_path):
    assert folder.recognises(str(written))
    for name in MODEL_FILES:
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        assert folder.recognises(str(tmp_path / name))
    assert not folder.recognises("not/there/yet")
    assert not folder.recognises(str(written / "config.toml"))
    assert not folder.recognises("demo:python")
    assert not folder.recognises("hf:org/model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    assert not folder.recognises(str(tmp_path / "other"))


def break_config(path):
    (path / "config.toml").write_text("schema = = 1")


def break_encoding(path):
    (path / "config.toml").write_bytes(b"\xff")


def endless_number(path):
    (path / "config.toml").write_text("schema = " + 5000 * "1")


def endless_nesting(path):
    (path / "config.toml").write_text("schema = " + 3000 * "[" + 3000 * "]")


def cut_tensors(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def cut_header(path):
    (path / "model.safetensors").write_bytes(b"\x01")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "config.toml").unlink(), "config.toml: missing; a checkpoint is a folder"),
        (lambda p: (p / "model.safetensors").unlink(), "model.safetensors: missing"),
        (break_config, "config.toml:1:10: Invalid value"),
        (break_encoding, "config.toml: not UTF-8 text: invalid start byte at byte 0"),
        (endless_number, "config.toml: an integer has too many digits"),
        (endless_nesting, "config.toml: nested"),
        (cut_tensors, "model.safetensors: truncated or no safetensors file"),
        (cut_header, "copy or download it again, or train it anew"),
    ],
)
def test_damage_is_named_with_its_file(folder, written, damage, message):
    damage(written)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        folder.read(str(written))


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_file_that_is_not_there_is_named(folder, written, name):
    (written / name).unlink()
    assert folder.recognises(str(written))
    message = f"{written / name}: missing; a checkpoint is a folder with config.toml and"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        folder.read(str(written))


# -- strict loading, and whole models ------------------------------------------------------------


def test_every_tensor_that_does_not_fit_is_listed_and_nothing_is_loaded():
    modules = torch.nn.ModuleDict({"decoder": torch.nn.Linear(3, 2)})
    before = modules["decoder"].weight.clone()
    given = {"decoder.weight": torch.ones(2, 4), "decoder.extra": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        load_tensors(modules, given, "some/folder")
    text = str(caught.value)
    assert text.startswith("some/folder: ")
    assert "decoder.weight: expected (2, 3), found (2, 4)" in text
    assert "decoder.bias: missing" in text
    assert "decoder.extra: not a parameter of this model" in text
    with pytest.raises(CheckpointError):
        load_tensors(modules, {"decoder.weight": torch.ones(2, 3)}, "some/folder")
    assert torch.equal(modules["decoder"].weight, before)


def test_loading_casts_to_the_dtype_of_the_model():
    modules = torch.nn.ModuleDict({"decoder": torch.nn.Linear(3, 2)}).double()
    given = {n: torch.full_like(t, 0.5).bfloat16() for n, t in modules.state_dict().items()}
    load_tensors(modules, given, "x")
    assert modules["decoder"].weight.dtype == torch.float64
    assert bool((modules["decoder"].weight == 0.5).all())


TABLES = {
    "schema": 1,
    "model": {"context_bytes": 32, "ids": {"byte_offset": 3, "bos": 0, "eos": 1, "size": 259}},
    "patcher": {
        "use": "entropy",
        "threshold": 1.0,
        "byte_scorer": {"use": "transformer", "dim": 8, "heads": 2, "layers": 1, "hidden": 8},
    },
    "encoder": {
        "use": "local", "dim": 8, "heads": 2, "hidden": 8, "latent_dim": 12, "ngram_rows": 5,
    },
    "global_model": {"use": "transformer", "latent_dim": 12, "layers": 1, "heads": 2, "hidden": 8},
    "decoder": {"use": "local", "dim": 8, "heads": 2, "hidden": 8, "layers": 1, "latent_dim": 12},
}  # fmt: skip


def model_of(tables):
    plan, tensors = plan_run(Config.from_mapping(tables), load_plugins())
    return build_model(plan, tensors)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_whole_model_is_rebuilt_from_its_folder(folder, tmp_path, dtype):
    model = model_of(TABLES)
    model.patcher.threshold = 0.1 + 0.2
    folder.write(tmp_path / "model", model_config(model), model_tensors(model, dtype))
    again = model_of({"schema": 1, "run": {"checkpoint": str(tmp_path / "model")}})
    assert again.patcher.threshold == 0.1 + 0.2
    assert again.context_bytes == 32
    assert again.scheme == model.scheme
    assert again.scheme.mask is None
    for name, tensor in model.module_dict().state_dict().items():
        stored = again.module_dict().state_dict()[name]
        assert stored.dtype == torch.float32
        assert torch.equal(stored, tensor if dtype is None else tensor.to(dtype).float())
    assert model_config(again) == model_config(model)
