"""Estimates of steps on other devices: what they are made of is exact, the rest is arithmetic."""

from __future__ import annotations

import json

import attrs
import pytest
import tomli_w
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from blt_core.cli.app import run
from blt_core.errors import ConfigError
from blt_core.loading import new_model
from blt_core.nn import RowTable
from blt_core.plugins.loading import load_plugins
from blt_core.wiring.config import Config
from blt_plugins.deepspeed.memory_plan import Zero, zero_traffic
from blt_plugins.training.backends.traffic import replicated_traffic, sharded_traffic
from blt_plugins.training.planning.devices import DEVICES, parse_device
from blt_plugins.training.planning.estimate import estimate
from blt_plugins.training.planning.plan import PhasePlan, Planner, full_batch, traced_phases
from blt_plugins.training.planning.tracing import trace_pass
from blt_plugins.training.setup.config import plan_training


@pytest.fixture
def planned(tables):
    """A config whose corpus is nowhere: a plan reads none."""
    tables["corpus"]["path"] = "no such folder"
    tables["train"]["accumulate"] = 4
    return tables


# -- what is counted -----------------------------------------------------------------------------

ATEN = torch.ops.aten


def attention(q, k, v, *_, **__) -> int:
    """Torch's own counter leaves out attention as CPUs run it."""
    return sdpa_flop_count(q, k, v)


def attention_backward(grad, q, k, v, *_, **__) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


CPU_ATTENTION = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: attention,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def test_products_are_counted_by_hand():
    module, x = nn.Linear(3, 5, bias=False), torch.ones(7, 3)
    traced = trace_pass(lambda: module(x).sum(), module, FakeTensorMode())
    assert traced.flops == 2 * (2 * 7 * 3 * 5)  # forward, and the gradient of the weight


def test_attention_on_a_cpu_is_counted():
    x = torch.ones(3, 2, 16, 8, requires_grad=True)  # 3 rows of a batch, 2 heads
    attend = nn.functional.scaled_dot_product_attention
    traced = trace_pass(lambda: attend(x, x, x).sum(), nn.Linear(1, 1), FakeTensorMode())
    product = 2 * 3 * 2 * 16 * 16 * 8
    assert traced.flops == (2 + 5) * product  # backward scores are computed again


def test_an_operation_that_makes_several_tensors_is_counted():
    module = nn.Conv1d(3, 5, 2, bias=False)
    x = torch.ones(1, 3, 8, requires_grad=True)
    traced = trace_pass(lambda: module(x).sum(), module, FakeTensorMode())
    # 7 places of 5 numbers from 2 · 3; forward, then the gradients of weight and input at once.
    assert traced.flops == 3 * (2 * 7 * 5 * 2 * 3)


@pytest.mark.parametrize(("objective", "checkpointing"), [("ar", False), ("blocks", True)])
def test_a_planned_pass_has_the_products_of_a_real_one(planned, objective, checkpointing):
    if objective == "blocks":
        planned["objective"] = {"use": "block-diffusion", "block_bytes": 4, "share": 0.5}
        planned["decoder"]["denoises"] = True
    planned["train"]["gradient_checkpointing"] = checkpointing
    config = Config.from_mapping(planned)
    training = plan_training(config, load_plugins())
    real = new_model(training.plan, None, 0)
    for phase, own in zip(
        Planner(config, load_plugins()).plan().phases, traced_phases(real, training), strict=True
    ):
        batch = full_batch(real, training.settings, own.step_bytes)
        rng = torch.Generator().manual_seed(0)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counted:
            own.loss(batch, rng)[0].backward()
        assert phase.pass_flops == counted.get_total_flops() > 0


def layered() -> nn.Module:
    """Two layers of 400 bytes, 200 at the root, and a table of 4,000."""
    layers = nn.ModuleList(nn.Linear(10, 10, bias=False) for _ in range(2))
    head, table = nn.Linear(10, 5, bias=False), RowTable(100, 10)
    return nn.ModuleDict({"layers": layers, "head": head, "table": table})


def test_what_processes_send_follows_from_what_they_keep():
    assert replicated_traffic(layered(), processes=4) == 2 * 5000 * 3 // 4
    assert replicated_traffic(layered(), processes=1) == 0
    # Layers are gathered twice, the root once; gradients of both, and rows, travel once each way.
    for passes in (1, 3):
        sent = sharded_traffic(layered(), processes=4, accumulate=passes, row_bytes=80)
        assert sent == passes * ((2 * 200 + 3 * 800 + 2 * 80) * 3 // 4)
    zero = {stage: Zero.of({"zero_optimization": {"stage": stage}}) for stage in range(4)}
    sent = [zero_traffic(1000, zero[s], processes=2, accumulate=4) for s in range(4)]
    assert sent == [2 * 2000, 3 * 2000, 9 * 2000, 12 * 2000]
    owner = {"stage": 2, "use_multi_rank_bucket_allreduce": False}
    half = Zero.of({"zero_optimization": owner, "bf16": {"enabled": True}})
    assert zero_traffic(1000, half, processes=2, accumulate=4) == 5 * 1000


def test_rows_that_a_pass_reads_are_part_of_what_fsdp_sends(planned):
    planned["training_backend"] = {"use": "torch", "strategy": "fsdp"}
    few, many = (
        Planner(Config.from_mapping(planned | {"encoder": encoder}), load_plugins()).plan(2)
        for encoder in ({**planned["encoder"], "ngram_sizes": sizes} for sizes in ([3], [3, 4, 5]))
    )
    # 64 bytes of text, 2 tables more, rows of 16 numbers of 4 bytes; 2 passes, both ways, half.
    assert many.phases[-1].traffic - few.phases[-1].traffic == 2 * 64 * (16 * 4) * 2


# -- arithmetic ----------------------------------------------------------------------------------


def test_a_step_takes_what_its_parts_take(planned):
    planner = Planner(Config.from_mapping(planned), load_plugins())
    _, device = parse_device(
        "own memory=1e9 flops=8e9 float32_flops=2e9 link=1e6 network=1e5 node=2 utilisation=0.5"
    )
    for processes, speed in ((1, 1e6), (2, 1e6), (4, 1e5)):
        phase: PhasePlan = planner.plan(processes).phases[-1]
        found = estimate(phase, processes, device)
        assert found.compute == pytest.approx(4 // processes * phase.pass_flops / 1e9)
        assert found.communication == pytest.approx(phase.traffic / speed)
        assert found.fastest == max(found.compute, found.communication)
        assert found.slowest == found.compute + found.communication
        low, high = found.efficiency
        assert 0 < low <= high <= 1
        assert (low == 1) == (processes == 1)
        assert found.fits
        assert not estimate(phase, processes, attrs.evolve(device, memory=phase.peak - 1)).fits
    planned["train"]["precision"] = "bfloat16"
    half = Planner(Config.from_mapping(planned), load_plugins()).plan(1).phases[-1]
    scorer = half.pass_flops - half.half_flops  # patches are found in float32
    assert 0 < scorer < half.half_flops
    seconds = 4 * (half.half_flops / 4e9 + scorer / 1e9)
    assert estimate(half, 1, device).compute == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h900", r"--device-type: no device 'h900' is known(?s:.*)h100"),
        ("h100 speed=3", r"--device-type: speed: unknown; known are memory"),
        ("h100 flops=fast", r"--device-type: flops: expected a number, got 'fast'"),
        ("h100 utilisation=2", r"--device-type: utilisation: expected 1e-06 to 1, got 2"),
        ("h100 node=2.5", r"--device-type: node: expected a whole number, got 2.5"),
        ("own memory=1e9", r"--device-type: link: missing"),
        ("", r"--device-type: expected the name of a device type first"),
    ],
)
def test_devices_that_are_not_known_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_device(text)


def test_numbers_of_a_known_device_may_be_others():
    name, found = parse_device("a100 utilisation=0.5 network=1e9")
    assert (name, found.utilisation, found.network) == ("a100", 0.5, 1e9)
    assert found.flops == DEVICES["a100"].flops


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def config(planned, tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(planned))
    return str(path)


def test_the_command_tells_each_number_of_processes(config, capsys):
    sizes = ["--world-size", "1", "--world-size", "4"]
    assert run(["train", config, "--plan", *sizes, "--device-type", "h100"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split()[:2] for line in shown.splitlines() if line.strip()[:1].isdigit()]
    assert rows == [[n, phase] for n in "14" for phase in ("scorer", "model")]
    assert "Estimates for h100: 80 GB; products at 40% of 989 TFLOP/s" in shown
    assert run(["train", config, "--plan", *sizes, "--device-type", "h100", "--json"]) == 0
    one, four = json.loads(capsys.readouterr().out)["plans"]
    assert (one["world_size"], four["world_size"]) == (1, 4)
    found = four["phases"]["model"]["estimate"]
    assert found["device_type"] == "h100"
    assert found["step"] == [
        max(found["compute"], found["communication"]),
        found["compute"] + found["communication"],
    ]
    assert "estimate" in one["phases"]["scorer"]


def test_a_device_type_without_a_plan_is_refused(config, capsys):
    assert run(["train", config, "--device-type", "h100"]) == 2
    assert "only --plan takes it" in capsys.readouterr().err
