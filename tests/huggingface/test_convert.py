"""``blt convert``: to our format and back, with equal logits on both sides."""

from __future__ import annotations

import json

import pytest
import tomli
import torch
from safetensors import safe_open

from blt_core.cli.app import run
from blt_core.errors import CheckpointError
from blt_core.pipeline import Pipeline
from tests.huggingface import published
from tests.huggingface.test_equal_logits import TOLERANCE, own_logits
from tests.huggingface.test_format import format_with

TEXT = b"There and back again: \xf0\x9f\xa7\x99 \x00\xff"


@pytest.mark.parametrize("name", published.SHAPES)
def test_there_and_back_keeps_every_logit(name, folder_of, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert run(["convert", str(folder_of(name)), str(ours)]) == 0
    assert run(["convert", str(ours), str(theirs), "--to", "huggingface"]) == 0
    want = published.logits(published.reference(name), TEXT)
    pipeline = Pipeline.from_config({"schema": 1, "run": {"checkpoint": str(ours)}})
    torch.testing.assert_close(own_logits(pipeline, TEXT)[0], want, rtol=0, atol=TOLERANCE)
    again = published.BltForCausalLM.from_pretrained(theirs)
    assert torch.equal(published.logits(again, TEXT), want)


def test_a_dtype_and_what_a_config_sets_are_stored(folder_of, tmp_path, capsys):
    config = tmp_path / "run.toml"
    config.write_text(
        f'schema = 1\n[run]\ncheckpoint = "{folder_of("plain")}"\n[patcher]\nthreshold = 0.5\n'
    )
    target = tmp_path / "small"
    assert run(["convert", str(config), str(target), "--dtype", "bfloat16", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert tomli.loads((target / "config.toml").read_text())["patcher"]["threshold"] == 0.5
    with safe_open(target / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            # The scorer stays what its threshold was calibrated with.
            kept = torch.float32 if name.startswith("patcher.") else torch.bfloat16
            assert file.get_tensor(name).dtype == kept
    reference = published.reference("plain")
    count = sum(p.numel() for p in reference.parameters())
    scorer = sum(p.numel() for p in reference.model.patcher.parameters())
    assert record == {"model": str(target), "parameters": count, "bytes": 2 * count + 2 * scorer}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "{taken}"], "taken: exists already; --force replaces a 'folder' checkpoint"),
        (["{folder}", "{new}", "--to", "hugginface"], "Did you mean 'huggingface'?"),
        (["{folder}", "{new}", "--dtype", "int8"], "dtype"),
        (["demo:python", "{new}", "--to", "huggingface"], "encoder.ngram_hash = 'mixed', which"),
        (["blt-1b", "{new}"], "run.checkpoint: missing; only a stored model can be converted"),
        (["{folder}", "{taken}", "--force"], "not replaced, since it is no folder with"),
        (["{folder}", "demo:own", "--to", "demo"], "demos ship with the package"),
    ],
)
def test_what_cannot_be_converted_is_named(arguments, message, folder_of, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("precious")
    names = {"folder": folder_of("plain"), "taken": taken, "new": tmp_path / "new"}
    assert run(["convert", *(text.format(**names) for text in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert (taken / "thesis.txt").read_text() == "precious"
    assert not (tmp_path / "new").exists()


def test_force_replaces_a_checkpoint_of_other_shards(folder_of, tmp_path):
    target = tmp_path / "model"
    source = str(folder_of("plain"))
    want = published.logits(published.reference("plain"), TEXT)
    for gigabytes in ("1e-4", "3e-4", "5", "1e-4"):
        to = f"huggingface shard_gigabytes={gigabytes}"
        assert run(["convert", source, str(target), "--to", to, "--force"]) == 0
        files = {path.name for path in target.iterdir()}
        assert ("model.safetensors" in files) == (gigabytes == "5")
        again = published.BltForCausalLM.from_pretrained(target)
        assert torch.equal(published.logits(again, TEXT), want)
    (target / "notes.txt").write_text("kept")
    assert run(["convert", source, str(target), "--to", "huggingface", "--force"]) == 0
    assert {path.name for path in target.iterdir()} == {
        *("config.json", "model.safetensors", "notes.txt")
    }


def test_a_model_of_other_parts_is_told_why_it_cannot_be_written(tmp_path):
    tables = {"patcher": {"use": "static"}, "decoder": {"use": "acme/other"}, "encoder": {}}
    with pytest.raises(CheckpointError, match=r"patcher\.use = 'static', which would have to be"):
        format_with().write(tmp_path / "x", tables, {"decoder.weight": torch.ones(1)})


def test_force_replaces_a_checkpoint(folder_of, tmp_path):
    target = tmp_path / "model"
    target.mkdir()  # an empty one is nothing that could be lost
    assert run(["convert", str(folder_of("plain")), str(target)]) == 0
    assert run(["convert", str(target), str(target), "--force", "--dtype", "bfloat16"]) == 0
    assert run(["convert", str(target), str(target)]) == 2
