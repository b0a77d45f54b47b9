"""The keys of the backend, and what DeepSpeed is given for them."""

from __future__ import annotations

import pytest
from torch import nn

from blt_core.component import BuildContext
from blt_core.errors import ConfigError, RunError
from blt_core.plugins.loading import load_plugins
from blt_core.wiring.resolve import resolve_component
from blt_plugins.deepspeed.backend import DeepSpeedBackend
from blt_plugins.deepspeed.settings import OWNED, DeepSpeedBackendParams, deepspeed_config


def config_of(**keys):
    return deepspeed_config(DeepSpeedBackendParams(**keys), clip=0.5, accumulate=3, world_size=2)


def test_a_step_has_the_passes_of_all_processes():
    config = config_of()
    assert config["train_batch_size"] == 6
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.5


def test_keys_of_the_raw_table_win_and_leave_the_others():
    raw = {"zero_optimization": {"overlap_comm": False, "offload_optimizer": {"device": "nvme"}}}
    config = config_of(stage=3, offload_optimizer="cpu", config={**raw, "steps_per_print": 5})
    zero = config["zero_optimization"]
    assert zero == {"stage": 3, "overlap_comm": False, "offload_optimizer": {"device": "nvme"}}
    assert config["steps_per_print"] == 5
    assert config["train_batch_size"] == 6


@pytest.mark.parametrize("path", OWNED, ids=".".join)
def test_keys_that_follow_from_others_are_refused_with_the_key_to_set(path):
    table: object = {"enabled": True}
    for key in reversed(path):
        table = {key: table}
    with pytest.raises(ConfigError) as error:
        resolve_component("training_backend", {"use": "deepspeed", "config": table}, load_plugins())
    message = str(error.value)
    assert "training_backend.config" in message
    assert f"{'.'.join(path)} is not set here; set {OWNED[path]} instead" in message


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stage": 0, "weight_dtype": "bfloat16"}, "needs stage 1 to 3"),
        ({"stage": 0, "offload_optimizer": "cpu"}, "needs stage 1 to 3"),
        ({"stage": 2, "offload_parameters": "cpu"}, "needs stage = 3"),
        ({"stage": 4}, "0 to 3"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        DeepSpeedBackendParams(**keys)


def test_a_raw_table_is_described_as_it_was_written():
    config = {"zero_optimization": {"overlap_comm": False, "stage3_max_live_parameters": 1000}}
    node = resolve_component(
        "training_backend", {"use": "deepspeed", "config": config}, load_plugins()
    )
    assert node.params.config == config


def test_a_module_that_is_not_float32_is_refused():
    backend = DeepSpeedBackend(DeepSpeedBackendParams(), BuildContext())
    with pytest.raises(RunError, match=r"not torch\.float64\n.*remove dtype"):
        backend.start(nn.Linear(2, 2).double(), [], clip=1.0, accumulate=1)


def test_a_step_before_the_start_is_an_error():
    with pytest.raises(RunError, match="was not started"):
        DeepSpeedBackend(DeepSpeedBackendParams(), BuildContext()).step(0.1)


def test_a_key_of_the_other_backend_is_told_to_be_its():
    table = {"use": "deepspeed", "optimizer": "muon"}
    with pytest.raises(ConfigError) as caught:
        resolve_component("training_backend", table, load_plugins())
    first = str(caught.value).splitlines()[0]
    assert first.endswith("unknown key. It is a key of training backend 'torch'.")
