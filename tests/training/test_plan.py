"""Memory plans: what is traced is what is used, and states follow from the formulas."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import tomli_w
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from blt_core.cli.app import run
from blt_core.errors import ConfigError
from blt_core.loading import new_model
from blt_core.model import patch_layout
from blt_core.nn import RowTable
from blt_core.plugins.loading import load_plugins
from blt_core.resources import resource
from blt_core.types import StateBytes, StateMemory
from blt_core.wiring.config import Config, load_config
from blt_core.wiring.resolve import Plan
from blt_plugins.training.backends.memory import replicated, sharded
from blt_plugins.training.backends.parameters import (
    gathered_layers,
    parameter_bytes,
    spreadable_tables,
    unit_bytes,
)
from blt_plugins.training.objectives.losses import MODEL, SCORER
from blt_plugins.training.planning.patches import even_flags
from blt_plugins.training.planning.plan import (
    PASS,
    SCORES,
    Planner,
    full_batch,
    traced_phases,
)
from blt_plugins.training.planning.tracing import Moment, trace_pass, trace_score
from blt_plugins.training.setup.config import plan_training
from tests.nightly import nightly_or
from tests.peaks import measured_peak

#: What the phase of the model trains.
PARTS = ("encoder", "global_model", "decoder")
BLOCKS = {"use": "block-diffusion", "share": 0.5, "inside_share": 0.2, "stale_share": 0.3}


@pytest.fixture
def planned(tables) -> dict[str, Any]:
    """A config whose corpus is nowhere: a plan reads none."""
    tables["corpus"]["path"] = "no such folder"
    return tables


def with_blocks(tables: dict[str, Any]) -> dict[str, Any]:
    return {**tables, "objective": BLOCKS, "decoder": {**tables["decoder"], "denoises": True}}


def planner(tables: dict[str, Any]) -> Planner:
    return Planner(Config.from_mapping(tables), load_plugins())


# -- tracing -------------------------------------------------------------------------------------


def test_live_bytes_are_those_of_a_pass_worked_out_by_hand():
    weight = nn.Parameter(torch.ones(100))
    module = nn.ParameterList([weight])

    def loss() -> torch.Tensor:
        doubled = weight * 2  # 400 bytes, not needed later
        squared = doubled.view(10, 10).exp()  # 400 bytes, kept for its gradient
        del doubled
        return squared.sum()

    moments = trace_pass(loss, module, FakeTensorMode()).moments
    # exp and what it read live together; a view is no memory. In the backward pass the gradient of
    # exp joins exp and the scalars, and is let go where that of the weight is made.
    assert max(moment.activations for moment in moments) in range(800, 1300)
    assert max(moment.gradients for moment in moments) == 400
    assert Moment(0, 0) not in moments
    # Without gradients exp is not kept: 400 bytes twice, for exp and what it reads.
    assert trace_score(loss, module, FakeTensorMode()) in range(800, 900)


def test_weights_of_parts_that_are_not_trained_are_no_activations():
    frozen, trained = nn.Linear(100, 100, bias=False), nn.Linear(100, 1)

    def loss() -> torch.Tensor:
        with torch.no_grad():
            read = frozen(torch.ones(1, 100))
        found: torch.Tensor = trained(read).sum()
        return found

    moments = trace_pass(loss, nn.ModuleList([frozen, trained]), FakeTensorMode()).moments
    assert max(moment.activations for moment in moments) < 4 * 100 * 100


@pytest.mark.parametrize("objective", ["ar", "blocks"])
@pytest.mark.parametrize(
    "settings", [{}, {"gradient_checkpointing": True}, {"precision": "bfloat16"}], ids=str
)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_fake_tensors_live_as_long_as_real_ones(planned, objective, settings):
    tables = with_blocks(planned) if objective == "blocks" else planned
    tables["train"] |= settings
    training = plan_training(Config.from_mapping(tables), load_plugins())
    real = new_model(training.plan, None, 0)
    phases = {phase.name: phase for phase in planner(tables).plan().phases}
    for phase in traced_phases(real, training):
        batch = full_batch(real, training.settings, phase.step_bytes)
        rng = torch.Generator().manual_seed(0)
        moments = trace_pass(
            lambda phase=phase, batch=batch, rng=rng: phase.loss(batch, rng)[0],
            phase.parts,
            FakeTensorMode(),
        ).moments
        found = max(moment.activations for moment in moments)
        assert phases[phase.name].activations == pytest.approx(found, rel=0.005)


def test_of_several_block_sizes_the_largest_is_planned(planned):
    def peak(size) -> int:
        return (
            planner(with_blocks(planned) | {"objective": {**BLOCKS, "block_bytes": size}})
            .plan()
            .peak
        )

    assert peak(4) < peak(16) == peak([4, 16]) == peak([16, 4, 8])


def test_checkpointed_gradients_need_less(planned):
    planned["global_model"]["layers"] = 6
    whole = planner(planned).plan().phases[-1]
    planned["train"]["gradient_checkpointing"] = True
    assert planner(planned).plan().phases[-1].activations < 0.8 * whole.activations


def test_a_plan_leaves_nothing_behind(planned):
    before = torch.get_default_dtype(), torch.get_rng_state()
    first, again = (planner(planned).plan() for _ in range(2))
    assert first == again
    assert torch.get_default_dtype() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@given(
    width=st.integers(16, 400),
    mean=st.floats(1.5, 8),
    longest=st.integers(8, 12),
)
def test_even_flags_have_the_mean_and_the_longest_patch(width, mean, longest):
    flags = even_flags(torch.zeros(2, width, dtype=torch.long), mean, longest)
    patches, _ = patch_layout(flags, (width, width))
    sizes = patches.size_bm[0].tolist()
    if width > 2 * longest + mean:
        assert max(sizes) >= longest or longest > width
        assert sum(sizes) / len(sizes) == pytest.approx(mean, rel=0.35, abs=1.0)


# -- against reality -----------------------------------------------------------------------------

#: Wide enough that libraries' own memory is small beside it.
LARGE: dict[str, Any] = {
    "train": {"batch_bytes": 2048, "context_bytes": 512, "steps": 2, "accumulate": 1},
    "model": {"context_bytes": 512},
    "encoder": {"dim": 96, "heads": 6, "hidden": 256, "latent_dim": 256, "ngram_rows": 5000},
    "global_model": {"latent_dim": 256, "layers": 4, "heads": 8, "hidden": 704},
    "decoder": {"dim": 192, "heads": 6, "hidden": 448, "layers": 3, "latent_dim": 256},
}


def large(planned: dict[str, Any]) -> dict[str, Any]:
    """The tiny config with the sizes of LARGE."""
    tables = {k: {**t, **LARGE.get(k, {})} for k, t in planned.items() if k != "schema"}
    return {"schema": 1, **tables}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    "objective",
    [
        pytest.param("ar", marks=pytest.mark.nightly(reason="with blocks there is more to plan")),
        pytest.param(
            "blocks",
            marks=pytest.mark.nightly(
                reason="passes are held to real tensors above, one process to two passes at once"
            ),
        ),
    ],
)
def test_a_plan_is_within_15_percent_of_the_peak_of_a_process(planned, objective, tmp_path):
    tables = large(with_blocks(planned) if objective == "blocks" else planned)
    tables["train"]["scorer"] = {"steps": 0}
    plan = planner(tables).plan()
    assert plan.phases[0].activations > 200e6
    assert plan.peak == pytest.approx(measured_peak(tables, MODEL, tmp_path), rel=0.15)


@pytest.mark.nightly(reason="planned as the model's phase is")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_phase_of_a_scorer_is_within_15_percent_of_the_peak_of_a_process(planned, tmp_path):
    tables = large(planned)
    scorer = {"dim": 192, "heads": 6, "hidden": 448, "layers": 3, "window": 256}
    tables["patcher"] = {**tables["patcher"], "byte_scorer": {"use": "transformer", **scorer}}
    tables["train"]["scorer"] = {"steps": 2, "batch_bytes": 8192}
    phase = planner(tables).plan().phases[0]
    assert phase.name == SCORER
    assert phase.activations > 200e6
    assert phase.peak == pytest.approx(measured_peak(tables, SCORER, tmp_path), rel=0.15)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("ddp", marks=pytest.mark.nightly(reason="its sizes by themselves: below")),
        "fsdp",
    ],
)
def test_a_plan_is_within_15_percent_of_the_peak_of_two_processes(planned, strategy, tmp_path):
    tables = large(planned)
    # Most memory is what the backend keeps: some 40 million parameters, half in tables.
    tables["global_model"] |= {"latent_dim": 512, "layers": 6, "hidden": 1408}
    for part in ("encoder", "decoder"):
        tables[part] |= {"latent_dim": 512}
    tables["encoder"] |= {"ngram_sizes": [3, 4], "ngram_rows": 100_000}
    tables["train"] |= {"batch_bytes": 1024, "accumulate": 2}
    tables["train"]["scorer"] = {"steps": 0}
    tables["training_backend"] = {"use": "torch", "strategy": strategy}
    plan = planner(tables).plan(2)
    measured = measured_peak(tables, MODEL, tmp_path, processes=2)
    assert plan.peak == pytest.approx(measured, rel=0.15)


@pytest.mark.nightly(reason="plans of one process and of two are measured")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("passes", [2, 4])
def test_passes_side_by_side_are_within_15_percent_of_the_peak(planned, passes, tmp_path):
    tables = large(planned)
    tables["train"] |= {"accumulate": passes, "batch_bytes": 2048 * passes, "scorer": {"steps": 0}}
    tables["training_backend"] = {"use": "torch", "parallel_passes": 2}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        plan = planner(tables).plan()
    finally:
        torch.set_num_threads(before)
    assert plan.phases[0].state.passes_at_once == 2
    measured = measured_peak(tables, MODEL, tmp_path, threads=2)
    assert plan.peak == pytest.approx(measured, rel=0.15)


# -- states --------------------------------------------------------------------------------------


def layered() -> nn.Module:
    """Two layers of 100 parameters that are called, and 50 at the root."""
    layers = nn.ModuleList(nn.Linear(10, 10, bias=False) for _ in range(2))
    return nn.ModuleDict({"layers": layers, "head": nn.Linear(10, 5, bias=False)})


def test_torch_keeps_weights_gradients_and_two_moments():
    assert replicated(layered(), processes=1) == StateMemory(StateBytes(1000, 1000, 2000))
    assert replicated(layered(), processes=4) == StateMemory(StateBytes(1000, 1000, 2000, 1000))


def test_fsdp_splits_all_and_gathers_the_root_and_two_layers():
    found = sharded(layered(), processes=4, accumulate=1).device
    assert (found.parameters, found.gradients, found.optimizer) == (250, 250, 500)
    assert found.buffers == (200 + 2 * 400) + (200 + 400)
    several = sharded(layered(), processes=4, accumulate=2).device
    assert several.buffers == found.buffers
    assert sharded(layered(), processes=1, accumulate=2) == replicated(layered(), processes=1)


def test_a_table_within_a_layer_is_not_gathered_with_it():
    class Layer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(10, 10, bias=False)
            self.table = RowTable(100, 10)

    module = nn.ModuleDict({"layers": nn.ModuleList([Layer()]), "head": nn.Linear(10, 5)})
    assert unit_bytes(module) == (4 * 55, [400], 4000)
    listed = nn.ModuleDict({"tables": nn.ModuleList([RowTable(100, 10)])})
    assert unit_bytes(listed) == (0, [0], 4000)


def test_fsdp_gathers_no_table():
    module = nn.ModuleDict({**layered(), "table": RowTable(100, 10)})
    found = sharded(module, processes=4, accumulate=1).device
    assert (found.parameters, found.gradients, found.optimizer) == (1250, 1250, 2500)
    assert found.buffers == (200 + 2 * 400) + (200 + 400)
    several = sharded(module, processes=4, accumulate=2).device
    assert several.buffers == found.buffers + 1000  # a pass's gradient of the process's own rows
    assert found.scoring == 5000 + 400


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_torch_backend_tells_what_it_keeps(planned, strategy):
    planned["training_backend"] = {"use": "torch", "strategy": strategy}
    planned["train"]["accumulate"] = 4
    found = planner(planned)
    model = {size: found.plan(size).phases[-1] for size in (1, 2, 4)}
    assert {phase.activations for phase in model.values()} == {model[1].activations}
    assert [phase.passes for phase in model.values()] == [4, 2, 1]
    shares = [model[1].state.device.optimizer / model[n].state.device.optimizer for n in (2, 4)]
    assert shares == pytest.approx([2, 4] if strategy == "fsdp" else [1, 1], rel=0.01)


def test_the_peak_is_the_sum_where_gradients_wait_and_less_for_a_single_pass(planned):
    for accumulate in (1, 2):
        planned["train"] |= {"accumulate": accumulate, "batch_bytes": 256 * accumulate}
        for phase in planner(planned).plan().phases:
            total = phase.frozen + phase.state.device.total + phase.activations
            if accumulate > 1:
                assert phase.peak == total
            else:
                assert total - phase.state.device.gradients <= phase.peak < total


def test_the_scorer_and_the_model_are_frozen_for_each_other(planned):
    scorer, model = planner(planned).plan().phases
    assert (scorer.name, model.name) == (SCORER, MODEL)
    assert scorer.frozen == 4 * model.parameters
    assert model.frozen == 4 * scorer.parameters
    assert planner(planned).plan().peak == max(scorer.peak, model.peak)


def test_the_moment_of_the_peak_is_told(planned):
    """Here a table is gathered for scores that is larger than all that a pass holds."""
    planned["train"]["accumulate"] = 8
    planned["training_backend"] = {"use": "torch", "strategy": "fsdp"}
    planned["encoder"]["ngram_rows"] = 20_000
    found = planner(planned)
    plan, alone = found.plan(8), found.plan(1)
    scorer, model = plan.phases
    assert plan.largest is model
    assert model.peak_in == SCORES
    assert model.peak > model.frozen + model.state.device.scored
    assert (scorer.peak_in, alone.phases[-1].peak_in) == (PASS, PASS)
    planned["train"] |= {"valid_bytes": 0, "scorer": {"steps": 0}}
    [unscored] = planner(planned).plan(8).phases
    assert unscored.state.device.scoring == 0
    assert unscored.peak_in == PASS
    assert unscored.peak < model.peak


# -- what is refused -----------------------------------------------------------------------------


def test_passes_that_cannot_be_dealt_out_are_refused_with_values_that_can(planned):
    planned["train"] |= {"accumulate": 4, "batch_bytes": 256}
    planned["train"]["scorer"]["batch_bytes"] = 512
    words = r"accumulate: 4 passes cannot be dealt out to 3 processes\n *set it to 6 \(for 2, 3 "
    words += r"processes\) and, .* train.batch_bytes = 384 and train.scorer.batch_bytes = 768"
    with pytest.raises(ConfigError, match=words):
        Planner(Config.from_mapping(planned), load_plugins(), (2, 3))
    with pytest.raises(ConfigError, match=r"set it to 6 and, .* train.batch_bytes = 384 and"):
        planner(planned).plan(3)
    before = planner(planned).plan(2)
    planned["train"] |= {"accumulate": 6, "batch_bytes": 384}
    planned["train"]["scorer"]["batch_bytes"] = 768
    found = Planner(Config.from_mapping(planned), load_plugins(), (2, 3))
    for one, other in zip(before.phases, found.plan(3).phases, strict=True):
        assert (one.rows, one.row_bytes) == (other.rows, other.row_bytes)  # passes are as large


def test_nothing_is_built_for_processes_that_are_refused(config, monkeypatch, capsys):
    monkeypatch.setattr(Plan, "build", lambda *_: pytest.fail("built"))
    sizes = ["--world-size", "2", "--world-size", "1024"]
    assert run(["train", str(config), "--plan", *sizes]) == 2
    assert "2 passes cannot be dealt out to 1024 processes" in capsys.readouterr().err


def test_a_backend_that_does_not_tell_is_refused(planned, monkeypatch):
    build = Plan.build

    def silent(plan: Plan, kind: str) -> Any:
        return object() if kind == "training_backend" else build(plan, kind)

    monkeypatch.setattr(Plan, "build", silent)
    with pytest.raises(ConfigError, match=r"training_backend.*does not tell what it keeps"):
        planner(planned)


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def config(planned, tmp_path) -> Path:
    planned["train"]["accumulate"] = 2
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(planned))
    return path


def test_the_command_prints_a_table_and_trains_nothing(config, capsys, tmp_path):
    assert run(["train", str(config), "--plan", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1:11]] == [
        "parameters", "gradients", "optimizer", "buffers", "step", "scoring", "staging", "frozen",
        "activations", "peak",
    ]  # fmt: skip
    assert "12 steps of 256 bytes (about 64 patches)" in shown
    [peaks] = (line.split()[1:] for line in shown.splitlines() if line.startswith(" peak"))
    phase = max(zip(peaks, ("scorer", "model"), strict=True))[1]
    assert f"the run takes {max(peaks)} GB, in the phase of the {phase}, in a pass" in shown
    assert not (tmp_path / "out").exists()


def test_the_record_has_what_the_table_has(config, capsys):
    assert run(["train", str(config), "--plan", "--world-size", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["world_size"] == 2
    model = record["phases"]["model"]
    assert (model["step_bytes"], model["total_bytes"]) == (256, 12 * 256)
    for phase in record["phases"].values():
        device = phase["device"]
        assert device["parameters"] == 4 * phase["trained_parameters"]
        assert (device["staging"], phase["host"]["staging"]) == (0, 0)
        assert device["peak"] <= sum(v for k, v in device.items() if k != "peak")
    assert record["peak"] == max(p["device"]["peak"] for p in record["phases"].values())
    assert record["peak"] == record["phases"][record["peak_phase"]]["device"]["peak"]
    assert model["peak_in"] == PASS


def test_every_field_of_the_record_is_documented(config, capsys):
    assert run(["train", str(config), "--plan", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    phase = record["phases"]["model"]
    for field in [*record, *record["phases"], *phase, *phase["device"], *phase["host"]]:
        assert f"`{field}`" in page, field


def test_a_scorer_that_is_trained_alone_is_planned(planned):
    scorer = planner(planned).plan().phases[0]
    for kind in ("encoder", "global_model", "decoder"):
        del planned[kind]
    del planned["train"]["steps"]
    [alone] = planner(planned).plan().phases
    assert alone == attrs.evolve(scorer, frozen=0, peak=scorer.peak - scorer.frozen)


def test_patches_that_nothing_learns_are_nothing_to_train(planned):
    for kind in ("encoder", "global_model", "decoder"):
        del planned[kind]
    del planned["train"]["steps"]
    planned["patcher"] = {"use": "static"}
    with pytest.raises(ConfigError, match="there is nothing to train"):
        planner(planned)


def test_a_world_size_without_a_plan_is_refused(config, capsys):
    assert run(["train", str(config), "--world-size", "2"]) == 2
    assert "only --plan takes it" in capsys.readouterr().err


# -- the recipes ---------------------------------------------------------------------------------

#: Of this part of the context: tracing takes time for each tile of attention.
SHORTER = nightly_or(128, 8)


def shortened(name: str) -> Planner:
    """The planner of a recipe, with less context."""
    config = load_config(resource("configs") / f"{name}.toml")
    train = copy.deepcopy(dict(config.tables["train"]))
    train["context_bytes"] //= SHORTER
    for phase in (train, train["scorer"]):
        phase["batch_bytes"] //= SHORTER
    return Planner(config.with_table("train", train), load_plugins())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "global_model", "encoder"), [("train-1b", 1.28e9, 19e6), ("train-3b", 2.82e9, 26e6)]
)
def test_the_recipes_have_the_paper_s_sizes(name, global_model, encoder):
    found = shortened(name)
    sizes = found.model.parameter_counts()
    assert sizes.global_model == pytest.approx(global_model, rel=0.005)
    assert sizes.encoder == pytest.approx(encoder, rel=0.03)
    assert sizes.decoder == pytest.approx(160e6, rel=0.015)
    assert sizes.scorer == pytest.approx(99.5e6, rel=0.001)


def test_fsdp_spreads_nearly_all_that_the_1b_recipe_trains():
    """Eight processes each keep less than a sixth of what one does, and gather little."""
    config = load_config(resource("configs") / "train-1b.toml")
    plan = plan_training(config, load_plugins()).plan
    with FakeTensorMode():
        module = nn.ModuleDict({kind: plan.build(kind) for kind in PARTS})
    layers = {id(p) for layer in gathered_layers(module) for p in layer.parameters()}
    tables = {id(table.weight) for table in spreadable_tables(module)}
    root = [p for p in module.parameters() if id(p) not in layers | tables]
    assert parameter_bytes(root) < 0.03 * parameter_bytes(module.parameters())
    for accumulate in (1, 4):
        alone, spread = (
            sharded(module, processes=n, accumulate=accumulate).device.total for n in (1, 8)
        )
        assert spread <= alone / 6


@pytest.mark.nightly(reason="the formulas are held above, the 1B shape with fsdp too")
@pytest.mark.parametrize(
    ("name", "optimizer_bytes"),
    [
        ("train-1b", 12),  # DeepSpeed's own float32 weights and two moments
        ("train-3b", 8),
    ],
)
def test_the_recipes_need_less_in_more_processes(name, optimizer_bytes):
    found = shortened(name)
    sizes = found.model.parameter_counts()
    few, many = found.plan(8), found.plan(64)
    assert many.phases[-1].peak < few.phases[-1].peak
    assert many.phases[0].peak == few.phases[0].peak, "a scorer is never sharded"
    for fewer, more in zip(few.phases, many.phases, strict=True):
        assert more.activations == fewer.activations
        assert fewer.passes == 8 * more.passes
    trained = few.phases[-1].parameters
    assert trained == sizes.global_model + sizes.encoder + sizes.decoder + sizes.tables
    optimizer = many.phases[-1].state.device.optimizer
    assert optimizer == pytest.approx(optimizer_bytes * trained / 64, rel=0.001)
    assert few.phases[-1].state.host == StateBytes()
    assert many.peak < 80e9
