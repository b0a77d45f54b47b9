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
from blt_plugins.training.planning import plan, tracing
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


#: Takes two steps with DDP, then with FSDP2, and tells what the second one sent, by what each
#: collective is given, and by what the process wrote to its sockets.
SENT = """
import json, sys, torch
from pathlib import Path
from torch.utils._python_dispatch import TorchDispatchMode
from blt_core.component import BuildContext
from blt_core.loading import new_model
from blt_core.plugins.loading import load_plugins
from blt_core.wiring.config import load_config
from blt_plugins.training.backends.parameters import parameter_groups
from blt_plugins.training.backends.torch import TorchBackend, TorchBackendParams
from blt_plugins.training.planning.plan import full_batch, traced_phases
from blt_plugins.training.setup.config import plan_training

class Sent(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.total += self.sent(func._opname, args)
        return func(*args, **(kwargs or {}))

    def sent(self, name, args):
        if name == "allreduce_":  # of two processes each sends half, then half of the sum
            return sum(each.nbytes for each in args[0])
        if name == "_allgather_base_":
            return args[1].nbytes
        if name == "_reduce_scatter_base_":
            return args[1].nbytes - args[0].nbytes
        if name == "alltoall_base_":
            rows = args[4]
            theirs = rows[1 - backend.rank] / max(sum(rows), 1) if rows else 1 / 2
            return round(args[1].nbytes * theirs)
        assert name in ("broadcast_", "barrier", "monitored_barrier_"), name
        return 0

def written():
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])

training = plan_training(load_config(sys.argv[1]), load_plugins())
for strategy in ("ddp", "fsdp"):
    model = new_model(training.plan, None, 0)
    [phase] = traced_phases(model, training)
    backend = TorchBackend(TorchBackendParams(strategy=strategy), BuildContext(model.scheme))
    groups = parameter_groups(phase.loss, 0.0)
    called = backend.start(phase.loss, groups, clip=1.0, accumulate=2)
    batch, rng = full_batch(model, training.settings, phase.step_bytes), torch.Generator()
    rng.manual_seed(backend.rank)
    torch.randint(10, 250, batch.rows.ids_br.shape, generator=rng, out=batch.rows.ids_br)
    for _ in range(2):
        with Sent() as ops:
            before = written()
            backend.backward([lambda: called(batch, rng)[0]] * 2)
            backend.step(1e-3)
            wire = written() - before
    print(json.dumps([strategy, backend.rank, ops.total, wire]))
    backend.release()
backend.close()
"""


@pytest.mark.slow
def test_two_processes_send_what_is_planned(planned, tmp_path, forks):
    planned["model"]["context_bytes"] = 128
    planned["train"] |= {"batch_bytes": 4 * 128, "scorer": {"steps": 0}}
    planned["encoder"] |= {"dim": 64, "ngram_sizes": [3, 4], "ngram_rows": 20_000}
    planned["decoder"] |= {"dim": 64, "layers": 2}
    traffic = {}
    for strategy in ("ddp", "fsdp"):
        planned["training_backend"] = {"use": "torch", "strategy": strategy}
        [phase] = Planner(Config.from_mapping(planned), load_plugins()).plan(2).phases
        assert phase.passes == 2
        traffic[strategy] = phase.traffic
    (tmp_path / "program.py").write_text(SENT)
    (tmp_path / "sent.toml").write_text(tomli_w.dumps(planned))
    done = forks.run(2, [str(tmp_path / "program.py"), str(tmp_path / "sent.toml")], {})
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 4
    for strategy, _, sent, wire in found:
        assert sent == pytest.approx(traffic[strategy], rel=0.02)
        if strategy == "ddp":
            assert wire == pytest.approx(sent, rel=0.01)
        else:  # gloo reduces and scatters by an all-reduce, which sends twice as much
            assert sent < wire < 1.5 * sent


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


def test_a_thousand_devices_of_a_named_type_are_estimated(planned, tmp_path, capsys, monkeypatch):
    planned["train"] |= {"accumulate": 1024, "batch_bytes": 1024 * 64}
    planned["train"]["scorer"]["batch_bytes"] = 1024 * 64
    planned["training_backend"] = {"use": "torch", "strategy": "fsdp"}
    (tmp_path / "many.toml").write_text(tomli_w.dumps(planned))
    sizes = (1, 8, 64, 512, 1024)
    command = ["train", str(tmp_path / "many.toml"), "--plan", "--device-type", "h100", "--json"]
    for size in sizes:
        command += ["--world-size", str(size)]
    traced = []
    monkeypatch.setattr(tracing, "BEAT", 0.0)  # tells of each operation
    monkeypatch.setattr(plan, "trace_pass", lambda *of: traced.append(of) or trace_pass(*of))
    assert run(command) == 0
    out, err = capsys.readouterr()
    assert len(traced) == 2  # of each phase once, whatever the passes and processes
    assert "tracing a pass of the model: 100 operations so far" in err
    plans = json.loads(out)["plans"]
    assert [each["world_size"] for each in plans] == list(sizes)
    models = [each["phases"]["model"] for each in plans]
    assert [model["passes"] for model in models] == [1024 // size for size in sizes]
    # The passes of all sizes are the same; what is kept and sent of a model of P bytes is not.
    assert len({model["device"]["activations"] for model in models}) == 1
    kept = [model["device"]["optimizer"] for model in models]
    assert kept == pytest.approx([kept[0] / size for size in sizes], abs=8)
    seconds = [model["estimate"]["compute"] for model in models]
    assert seconds == pytest.approx([seconds[0] / size for size in sizes])
    sent = [model["traffic"] / model["passes"] for model in models]
    whole = [each * size / (size - 1) for each, size in zip(sent[1:], sizes[1:], strict=True)]
    assert sent[0] == 0
    assert whole == pytest.approx([whole[0]] * 4, abs=2)
    assert all(model["estimate"]["fits"] for model in models)


def test_a_device_type_without_a_plan_is_refused(config, capsys):
    assert run(["train", config, "--device-type", "h100"]) == 2
    assert "only --plan takes it" in capsys.readouterr().err
