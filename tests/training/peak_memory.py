"""A program: the peak memory of two steps and a score of one phase, beyond what was there before.

``peak_memory.py CONFIG PHASE``, alone or under torchrun; process 0 prints it, in bytes, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from blt_core.loading import new_model
from blt_core.model import Model
from blt_core.plugins.loading import load_plugins
from blt_core.protocols import TrainingBackend
from blt_core.wiring.config import load_config
from blt_plugins.training.backends.parameters import parameter_groups
from blt_plugins.training.backends.torch import scorer_backend
from blt_plugins.training.objectives.losses import MODEL
from blt_plugins.training.planning.plan import TracedPhase, full_batch, traced_phases
from blt_plugins.training.scores.held_out import evaluate_model
from blt_plugins.training.setup.config import TrainingPlan, plan_training


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
    model = new_model(training.plan, None, training.settings.seed)
    phase = next(p for p in traced_phases(model, training) if p.name == sys.argv[2])
    # The loop trains a scorer so, whatever the config's backend is.
    backend: TrainingBackend = (
        training.plan.build("training_backend")
        if phase.name == MODEL
        else scorer_backend(training.plan.build("training_backend"), model.scheme)
    )
    train(phase, training, backend, model)
    peak = status("VmHWM") - before
    if backend.rank == 0:
        sys.stdout.write(json.dumps({"peak": peak}))
        sys.stdout.flush()
    backend.close()


def train(
    phase: TracedPhase, training: TrainingPlan, backend: TrainingBackend, model: Model
) -> None:
    """Two steps of ``phase``, and a held-out score where it trains the model."""
    settings = training.settings
    passes = settings.accumulate // backend.world_size
    module = backend.start(
        phase.loss,
        parameter_groups(phase.loss, settings.weight_decay),  # as the loop does, kept by nobody
        clip=settings.clip,
        accumulate=passes,
    )
    batch = full_batch(model, settings, phase.step_bytes)

    def loss() -> Tensor:
        found: Tensor = module(batch, torch.Generator().manual_seed(0))[0]
        return found

    for _ in range(2):
        backend.backward([loss] * passes)
        backend.step(1e-3)
    if phase.name == MODEL:
        with backend.whole():
            evaluate_model(model, [batch])


main()
