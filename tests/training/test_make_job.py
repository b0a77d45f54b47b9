"""Configs that cannot be trained, told before any work."""

from __future__ import annotations

import re

import pytest

from blt_core.errors import ConfigError
from blt_core.plugins.loading import load_plugins
from blt_core.wiring.config import Config
from blt_plugins.training.run.make_job import make_job


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
        ("run", {"scorer_dtype": "bfloat16"}, "run.scorer_dtype: training runs in float32"),
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


@pytest.mark.parametrize("claimed", [True, False])
def test_an_objective_must_train_what_the_config_claims(new_job, tables, claimed):
    tables["decoder"]["denoises"] = claimed
    if not claimed:
        new_job()
        return
    with pytest.raises(ConfigError, match=r"decoder\.denoises: the objective 'ar' does not train"):
        new_job()


@pytest.mark.parametrize("table", ["corpus", "model", "train", "decoder"])
def test_a_missing_table_is_named(tables, table):
    del tables[table]
    with pytest.raises(ConfigError, match=rf"tiny\.toml: {table}: missing"):
        make_job(Config.from_mapping(tables, "tiny.toml"), load_plugins())


def test_steps_and_parts_of_a_model_go_together(new_job, tables):
    with pytest.raises(ConfigError, match=r"train\.steps: missing"):
        new_job(steps=0)
    for kind in ("encoder", "global_model", "decoder"):
        del tables[kind]
    with pytest.raises(ConfigError, match=r"train\.steps: a scorer is trained alone without"):
        new_job()
