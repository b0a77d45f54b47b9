"""A program: the peak memory of two steps of a config's model, beyond what was there before."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from blt_core.config import load_config
from blt_core.pipeline import new_model
from blt_core.plugins import load_plugins
from blt_plugins.training.job import plan_training
from blt_plugins.training.plan import full_batch, traced_phases
from blt_plugins.training.schedule import parameter_groups


def status(name: str) -> int:
    """Bytes of one line of this process' status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def warm_up() -> None:
    """Load what a step loads: kernels and the optimizer."""
    weight = torch.randn(64, 64, requires_grad=True)
    (weight @ weight).sum().backward()
    torch.optim.AdamW([weight], fused=True).step()


def main() -> None:
    """Train, and print the peak as JSON."""
    training = plan_training(load_config(sys.argv[1]), load_plugins())
    warm_up()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    settings = training.settings
    model = new_model(training.plan, None, settings.seed)
    phase = traced_phases(model, training)[-1]
    backend = training.plan.build("training_backend")
    groups = parameter_groups(phase.loss, settings.weight_decay)
    module = backend.start(phase.loss, groups, clip=settings.clip, accumulate=settings.accumulate)
    rng = torch.Generator().manual_seed(0)
    for _ in range(2):
        for _ in range(settings.accumulate):
            batch = full_batch(model, settings, phase.step_bytes)
            backend.backward(module(batch, rng)[0])
        backend.step(1e-3)
    sys.stdout.write(json.dumps({"peak": status("VmHWM") - before}))


main()
