"""What the format reads, old and new, whole and in shards; what it refuses, by name."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from blt_core.component import BuildContext
from blt_core.errors import CheckpointError
from blt_core.pipeline import Pipeline
from blt_plugins.huggingface.format import HuggingfaceFormat, HuggingfaceFormatParams
from blt_plugins.huggingface.reading import tables_of
from blt_plugins.huggingface.writing import config_of
from tests.huggingface import published
from tests.huggingface.test_equal_logits import TOLERANCE, own_logits

PARTS = ("patcher_config", "encoder_config", "decoder_config", "global_config")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"
TEXT = b"The format: \xe2\x9c\x93 read."


def format_with(gigabytes=5.0):
    return HuggingfaceFormat(HuggingfaceFormatParams(shard_gigabytes=gigabytes), BuildContext())


@pytest.fixture
def folder(folder_of, tmp_path):
    """A copy of a folder that transformers saved, to be changed."""
    return shutil.copytree(folder_of("plain"), tmp_path / "model")


def config_in(folder):
    return json.loads((folder / "config.json").read_text())


def change(folder, edit):
    config = config_in(folder)
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def loads_equal(folder):
    pipeline = Pipeline.from_config({"schema": 1, "run": {"checkpoint": str(folder)}})
    want = published.logits(published.reference("plain"), TEXT)
    torch.testing.assert_close(own_logits(pipeline, TEXT)[0], want, rtol=0, atol=TOLERANCE)


# -- what is read ------------------------------


def test_a_folder_is_known_by_its_config_json(folder, tmp_path):
    assert format_with().recognises(str(folder))
    assert not format_with().recognises(str(tmp_path))
    assert not format_with().recognises("demo:python")
    (folder / "config.toml").touch()
    assert not format_with().recognises(str(folder))


def test_old_names_of_keys_are_read(folder):
    def age(config):
        for part in PARTS:
            table = config[part]
            table["norm_eps"] = table.pop("rms_norm_eps")
            table["rope_theta"] = table.pop("rope_parameters")["rope_theta"]
            table["rope_scaling"] = {"rope_type": "default"}
            del table["head_dim" if "head_dim" in table else "initializer_range"]
        del config["local_attention_window_len"]  # 512 where it is absent

    change(folder, age)
    loads_equal(folder)


def test_an_eos_may_be_a_list_of_one(folder):
    change(folder, lambda config: config.update(eos_token_id=[2]))
    loads_equal(folder)


def test_tables_of_positions_in_old_files_are_passed_over(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file) | {"model.patcher.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors, file)
    loads_equal(folder)


def test_absent_keys_have_the_defaults_of_transformers():
    config = published.BltConfig().to_dict()
    assert tables_of({"model_type": "blt"}, "x") == tables_of(config, "x")


def test_shards_are_read_and_written(folder, tmp_path):
    published.reference("plain").save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    assert not (tmp_path / "theirs" / "model.safetensors").exists()
    loads_equal(tmp_path / "theirs")
    writer = format_with(gigabytes=2e-4)
    writer.write(tmp_path / "ours", *writer.read(str(folder)))
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    loads_equal(tmp_path / "ours")
    again = published.BltForCausalLM.from_pretrained(tmp_path / "ours")
    want = published.logits(published.reference("plain"), TEXT)
    assert torch.equal(published.logits(again, TEXT), want)


def test_what_is_written_reads_back_as_it_was():
    for shape in published.SHAPES.values():
        tables = tables_of(shape.config.to_dict(), "x")
        assert tables_of(config_of(tables, "x"), "x") == tables


# -- what is refused ------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(model_type="llama"), "model_type = 'llama'; only 'blt' models"),
        (lambda c: c.update(max_patch_length=8), "max_patch_length = 8 is not supported"),
        (lambda c: c.update(patching_mode="bpe"), "patching_mode = 'bpe' is not supported"),
        (lambda c: c.update(patch_in_forward=False), "patch_in_forward = False is not supported"),
        (lambda c: c.update(tie_word_embeddings=True), "tie_word_embeddings = True is not"),
        (lambda c: c.update(eos_token_id=7), "eos_token_id = 7 is not supported; expected 2"),
        (lambda c: c.update(eos_token_id=[2, 3]), "eos_token_id = [2, 3] is not supported"),
        (lambda c: c.update(patch_size=None), "patch_size = None is not supported"),
        (lambda c: c.update(patching_threshold=None), "patching_threshold = None is not supported"),
        (
            lambda c: c["global_config"].update(num_attention_heads=3),
            "global_config.num_attention_heads: 3 heads do not divide 64 into even widths",
        ),
        (
            lambda c: c["global_config"].update(num_key_value_heads=3),
            "global_config.num_key_value_heads: 3 does not divide the 4 heads",
        ),
        (lambda c: c.update(patching_threshold=10**400), "patching_threshold: expected a number"),
        (
            lambda c: c["global_config"].update(hidden_act="gelu"),
            "global_config.hidden_act = 'gelu' is not supported",
        ),
        (
            lambda c: c["encoder_config"].update(rms_norm_eps=1e-6),
            "encoder_config.rms_norm_eps: only 1e-05 is supported",
        ),
        (
            lambda c: c["decoder_config"].update(num_key_value_heads=1),
            "decoder_config.num_key_value_heads = 1 is not supported",
        ),
        (
            lambda c: c["decoder_config"].update(cross_attn_all_layers=False),
            "decoder_config.cross_attn_all_layers = False is not supported",
        ),
        (
            lambda c: c["patcher_config"]["rope_parameters"].update(rope_type="yarn"),
            "patcher_config.rope_parameters.rope_type = 'yarn' is not supported",
        ),
        (
            lambda c: c["patcher_config"].update(hidden_size="wide"),
            "patcher_config.hidden_size: expected a whole number from 1 on, got 'wide'",
        ),
        (
            lambda c: c["encoder_config"].pop("cross_attn_k") and c.update(cross_attn_k=3),
            "encoder_config.cross_attn_k = 2 (the default) is not supported; expected 3",
        ),
        (
            lambda c: c["decoder_config"].update(hidden_size_global=32),
            "decoder_config.hidden_size_global = 32 is not supported",
        ),
        (lambda c: c.update(patcher_config=3), "patcher_config: expected a table, got 3"),
        (
            lambda c: c.update(patching_threshold="high"),
            "patching_threshold: expected a number, got 'high'",
        ),
        (
            lambda c: c.update(encoder_hash_byte_group_size=[3, 0]),
            "encoder_hash_byte_group_size: expected a whole number from 1 on, got 0",
        ),
    ],
)
def test_what_cannot_run_here_is_refused_by_its_name(folder, edit, message):
    change(folder, edit)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        format_with().read(str(folder))
    assert str(folder / "config.json") in str(caught.value)


def test_all_that_is_unsupported_is_listed_at_once(folder):
    change(folder, lambda c: c.update(max_patch_length=8, patching_mode="bpe"))
    with pytest.raises(CheckpointError) as caught:
        format_with().read(str(folder))
    assert "max_patch_length" in str(caught.value)
    assert "patching_mode" in str(caught.value)


def test_missing_surplus_and_misshapen_tensors_are_listed(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.local_decoder.norm.weight"]
    tensors["model.extra.weight"] = torch.ones(2)
    tensors["lm_head.weight"] = torch.ones(3, 4)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        format_with().read(str(folder))
    text = str(caught.value)
    assert "model.local_decoder.norm.weight: missing" in text
    assert "model.extra.weight: no tensor of this model" in text
    assert "lm_head.weight: expected (260, 32), found (3, 4)" in text
    assert str(folder) in text


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def test_a_byte_order_mark_and_strays_are_passed_over(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text, encoding="utf-8-sig")
    format_with().read(str(folder))
    lose_weights(folder)
    (folder / "._pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="no weights; expected"):
        format_with().read(str(folder))


def lose_weights(folder):
    (folder / "model.safetensors").unlink()


def pickle_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_a_shard(folder):
    lose_weights(folder)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def break_index(folder):
    lose_weights(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "model.safetensors: truncated or no safetensors file"),
        (lose_weights, "no weights; expected model.safetensors, or model.safetensors.index.json"),
        (pickle_weights, "pickled weights can run any program and are not read"),
        (lose_a_shard, "model-00001-of-00002.safetensors: missing, though"),
        (break_index, "weight_map: expected a table of file names"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: not read: nested"),
        (lambda f: (f / "config.json").write_text("9" * 5000), "config.json: not read: an integer"),
        (lambda f: (f / "model.safetensors").write_text(POINTER), "safetensors: a Git-LFS pointer"),
        (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object, got list"),
    ],
)
def test_damage_is_named_with_its_file(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        format_with().read(str(folder))
