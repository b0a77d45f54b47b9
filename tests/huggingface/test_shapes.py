"""The layout names every parameter of a model with its shape, also at the released sizes."""

from __future__ import annotations

import json

import pytest
import torch

from blt_core.cli.app import run
from blt_core.model import Model
from blt_core.plugins.loading import load_plugins
from blt_core.protocols import MODEL_KINDS
from blt_core.resources import resource
from blt_core.wiring.config import Config, load_config
from blt_core.wiring.resolve import resolve
from blt_plugins.huggingface.reading import tables_of
from blt_plugins.huggingface.tensors import layout_of
from blt_plugins.huggingface.writing import config_of
from tests.huggingface import published

RELEASED = {
    "1B": {"model_type": "blt", "encoder_config": {"intermediate_size": 2816}},
    "7B": {
        "model_type": "blt",
        "cross_attn_k": 4,
        "encoder_config": {
            "cross_attn_k": 4,
            "hidden_size": 1280,
            "num_attention_heads": 20,
            "intermediate_size": 3584,
        },
        "decoder_config": {
            "cross_attn_k": 4,
            "hidden_size_global": 4096,
            "hidden_size": 1280,
            "num_attention_heads": 20,
            "intermediate_size": 3584,
            "num_hidden_layers": 6,
        },
        "global_config": {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
        },
    },
}
CONFIGS = {
    **RELEASED,
    **{name: shape.config.to_dict() for name, shape in published.SHAPES.items()},
}


def on_meta(tables):
    plan = resolve(Config.from_mapping(tables), load_plugins(), needs=MODEL_KINDS)
    with torch.device("meta"):
        return Model(**{kind: plan.build(kind, None) for kind in MODEL_KINDS})


@pytest.mark.parametrize("name", CONFIGS)
def test_each_parameter_has_its_published_tensors(name):
    tables = tables_of(CONFIGS[name], name)
    model = on_meta(tables)
    found = {
        own: (sum(source.shape[0] for source in sources), *sources[0].shape[1:])
        for own, sources in layout_of(tables).items()
    }
    assert found == {own: tuple(t.shape) for own, t in model.module_dict().state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_published_tensors_are_those_of_transformers(name):
    layout = layout_of(tables_of(CONFIGS[name], name))
    with torch.device("meta"):
        model = published.BltForCausalLM(published.BltConfig.from_dict(CONFIGS[name]))
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert {s.name: s.shape for sources in layout.values() for s in sources} == wanted


def test_what_the_shipped_training_config_makes_has_a_config_json():
    config = load_config(resource("configs") / "train-python-hf.toml")
    known = config.with_table("patcher", {**config.tables["patcher"], "threshold": 1.0})
    kept = {key: known.tables[key] for key in ("schema", "model", *MODEL_KINDS)}
    plan = resolve(Config.from_mapping(kept), load_plugins(), needs=MODEL_KINDS)
    written = config_of(plan.describe_model(), "x")
    assert published.BltConfig.from_dict(written).patcher_config.sliding_window == 512
    assert tables_of(written, "x")["decoder"]["layers"] == 4


def test_the_shipped_config_generates_from_a_folder(folder_of, capsysbinary):
    arguments = ["--checkpoint", str(folder_of("plain")), "--prompt", "one command"]
    assert run(["generate", "blt-1b-hf", *arguments, "--max-new-bytes", "12", "--json"]) == 0
    record = json.loads(capsysbinary.readouterr().out)
    assert record["drafted"] > 0
    assert record["stop_reason"] in ("length", "eos")
    assert run(["check", "blt-1b-hf", *arguments[:2]]) == 0
    shown = capsysbinary.readouterr().out.decode()
    assert 'ngram_hash = "published"' in shown
    assert 'dtype = "bfloat16"' in shown
