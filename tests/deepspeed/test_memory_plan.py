"""What DeepSpeed keeps: by the formulas of its stages, and as measured."""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import Any

import pytest
import torch

from blt_core.errors import ConfigError, RunError
from blt_core.plugins.loading import load_plugins
from blt_core.types import StateBytes
from blt_core.wiring.config import Config
from blt_plugins.deepspeed.memory_plan import Zero, check_gathers, zero_memory
from blt_plugins.training.objectives.losses import MODEL
from blt_plugins.training.planning.plan import Planner
from blt_plugins.training.run.make_job import make_job
from blt_plugins.training.setup.config import plan_training
from tests.peaks import measured_peak

SIZES = (600, 400)


def zero(stage: int, **changes: Any) -> Zero:
    """A stage with buckets of 10 numbers."""
    table = {"stage": stage, "reduce_bucket_size": 10, "stage3_max_live_parameters": 100}
    half = changes.pop("half", False)
    return Zero.of({"zero_optimization": table | changes, "bf16": {"enabled": half}})


def test_each_stage_splits_more():
    whole = [zero_memory(SIZES, zero(stage), processes=4).device for stage in range(4)]
    assert [(x.parameters, x.gradients, x.optimizer) for x in whole] == [
        (4000, 4000, 8000),
        (4000, 4000, 3000),
        (4000, 1000, 3000),
        (1000, 1000, 2000),
    ]
    # A bucket; beside it the weights that stage 3 gathers.
    assert [x.buffers for x in whole] == [40, 40, 40, 40 + 400]


def test_a_weight_that_stage_3_may_not_gather_is_refused():
    for stage in range(3):
        check_gathers({"table": 101}, zero(stage))
    check_gathers({"table": 100, "head": 100}, zero(3))
    with pytest.raises(RunError, match=r"(?s)table: 101 .*allows 100\n.*strategy = 'fsdp'"):
        check_gathers({"head": 50, "table": 101}, zero(3))


def test_bfloat16_halves_weights_gradients_and_buffers_but_not_the_optimizer():
    for stage in (1, 2, 3):
        full, half = (
            zero_memory(SIZES, zero(stage, half=half), processes=4) for half in (False, True)
        )
        assert half.passes_in is torch.bfloat16
        assert full.passes_in is None
        for name in ("parameters", "gradients", "buffers"):
            assert 2 * getattr(half.device, name) == getattr(full.device, name)
        assert half.device.optimizer == 3000


def test_offloading_moves_to_the_host():
    moved = zero_memory(
        SIZES,
        zero(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}),
        processes=4,
    )
    # Weights are gathered for scores all the same, beside the bucket.
    assert moved.device == StateBytes(buffers=440, scoring=40 + 4000)
    assert (moved.host.parameters, moved.host.gradients, moved.host.optimizer) == (1000, 1000, 3000)
    second = zero_memory(SIZES, zero(2, offload_optimizer={"device": "cpu"}), processes=4)
    assert second.device == StateBytes(parameters=4000, buffers=40)
    assert second.host.total == 1000 + 3000 + 1000
    first = zero_memory(SIZES, zero(1, offload_optimizer={"device": "cpu"}), processes=4)
    assert first.device.gradients == 4000


def test_overlap_doubles_the_bucket_of_stages_1_and_2():
    buffers = [
        zero_memory(SIZES, zero(stage, overlap_comm=True), processes=4).device.buffers
        for stage in (1, 2, 3)
    ]
    assert buffers == [80, 80, 440]


def test_defaults_are_those_of_deepspeed():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage in (1, 3):
        own, theirs = (
            Zero.of({"zero_optimization": {"stage": stage}}),
            DeepSpeedZeroConfig(stage=stage),
        )
        assert own.reduce_bucket == theirs.reduce_bucket_size
        assert own.live_parameters == theirs.max_live_parameters
        assert own.overlap == bool(theirs.overlap_comm)


TABLES: dict[str, Any] = {
    "schema": 1,
    "corpus": {"use": "folder", "path": "no such folder"},
    "train": {"steps": 2, "batch_bytes": 1024, "scorer": {"steps": 0}},
    "model": {"context_bytes": 1024},
    "patcher": {"use": "static"},
    # Most memory is what the backend keeps: 58 million parameters of look-up tables. What the
    # libraries take for themselves, some 100 MB, is little beside it.
    "encoder": {
        "use": "local", "dim": 64, "heads": 2, "hidden": 64, "latent_dim": 64,
        "ngram_sizes": [3], "ngram_rows": 900_000, "window": 64,
    },
    "global_model": {"use": "transformer", "latent_dim": 64, "layers": 1, "heads": 2, "hidden": 64},
    "decoder": {
        "use": "local", "dim": 64, "heads": 2, "hidden": 64, "layers": 1, "latent_dim": 64,
        "window": 64,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("stage", "weight_dtype"),
    [
        pytest.param(
            *(0, "float32"),
            marks=pytest.mark.nightly(reason="nothing of it is split: the others hold its formula"),
        ),
        pytest.param(
            *(2, "bfloat16"), marks=pytest.mark.nightly(reason="stage 3 splits what stage 2 does")
        ),
        pytest.param(
            *(3, "float32"), marks=pytest.mark.nightly(reason="the formulas are held above")
        ),
    ],
)
def test_a_plan_is_within_15_percent_of_the_peak_of_a_process(stage, weight_dtype, tmp_path):
    tables = copy.deepcopy(TABLES)
    tables["training_backend"] = {
        "use": "deepspeed",
        "stage": stage,
        "weight_dtype": weight_dtype,
        "config": {"zero_optimization": {"reduce_bucket_size": 1_000_000}},
    }
    plan = Planner(Config.from_mapping(tables), load_plugins()).plan()
    measured = measured_peak(tables, MODEL, tmp_path)
    assert plan.peak == pytest.approx(measured, rel=0.15)


def test_run_and_plan_refuse_a_table_that_stage_3_may_not_gather():
    live = {"zero_optimization": {"stage3_max_live_parameters": 5_000_000}}
    tables = TABLES | {"training_backend": {"use": "deepspeed", "stage": 3, "config": live}}
    config = Config.from_mapping(tables)
    with pytest.raises(RunError, match=r"encoder\.ngrams\.table\.weight: 57,600,000 parameters"):
        Planner(config, load_plugins()).plan()
    plan = plan_training(config, load_plugins()).plan
    module = torch.nn.ModuleDict({"encoder": plan.build("encoder")})
    with pytest.raises(RunError, match=r"stage3_max_live_parameters = 57600000 in"):
        plan.build("training_backend").start(module, [], clip=1.0, accumulate=1)


def test_run_and_plan_refuse_states_in_the_background(tmp_path):
    """DeepSpeed writes from the tensors that it trains."""
    backend = {"use": "deepspeed", "stage": 1}
    train = {**TABLES["train"], "async_states": True}
    corpus = {**TABLES["corpus"], "path": str(tmp_path)}
    tables = TABLES | {"training_backend": backend, "train": train, "corpus": corpus}
    config = Config.from_mapping(tables)
    for refused in (Planner, partial(make_job, out=tmp_path / "out")):
        with pytest.raises(ConfigError, match=r"train\.async_states: .*'deepspeed'") as error:
            refused(config, load_plugins())
        assert "set training_backend.use = 'torch'" in str(error.value)
