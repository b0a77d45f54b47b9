"""The two phases of a training run: the byte scorer, then the model over its patches."""

from __future__ import annotations

import hashlib

import attrs
import torch
from torch import nn

from blt_core.model import Model
from blt_core.protocols import Documents, Objective
from blt_plugins.training.data.order import Batches
from blt_plugins.training.data.windows import Windows
from blt_plugins.training.objectives.losses import MODEL, SCORER, ModelLoss, ScorerLoss
from blt_plugins.training.setup.schedule import Schedule
from blt_plugins.training.setup.scorer import trainable_scorer
from blt_plugins.training.setup.settings import ScorerSettings, TrainSettings


@attrs.frozen(eq=False, kw_only=True)
class Phase:
    """What one phase trains, on what, and how fast.

    module: called with a batch and a generator, it gives the loss; its ``state_dict`` has the names
    of a model's tensors. passes: of a step, in all processes together.
    """

    name: str
    module: nn.Module
    batches: Batches
    passes: int
    schedule: Schedule
    seed: int

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.schedule.steps

    def generator(self, step: int, index: int) -> torch.Generator:
        """Where the random choices of pass ``index`` of a step come from."""
        key = f"{self.seed}/{self.name}/{step}/{index}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:7], "big")
        return torch.Generator().manual_seed(seed)


def make_phases(
    model: Model,
    objective: Objective,
    settings: TrainSettings,
    documents: Documents,
    windows: Windows,
    *,
    label: str = "the objective",
) -> list[Phase]:
    """The phases of a run, in order: the scorer's if there is one to train, and the model's.

    label: how messages name the objective.
    """

    def phase(
        name: str, module: nn.Module, of: TrainSettings | ScorerSettings, passes: int
    ) -> Phase:
        batches = Batches(
            documents,
            windows,
            scheme=model.scheme,
            batch_bytes=max(of.batch_bytes // passes, 1),
            seed=f"{settings.seed}/{name}",
            shuffle_bytes=settings.shuffle_bytes,
        )
        schedule = Schedule(
            steps=of.steps,
            peak=of.learning_rate,
            warmup_steps=of.warmup_steps,
            shape=settings.schedule,
            final_rate=settings.final_rate,
            decay_share=settings.decay_share,
        )
        return Phase(
            name=name,
            module=module,
            batches=batches,
            passes=passes,
            schedule=schedule,
            seed=settings.seed,
        )

    phases, scorer = [], trainable_scorer(model)
    if scorer is not None and settings.scorer.steps:
        phases.append(phase(SCORER, ScorerLoss(scorer), settings.scorer, settings.accumulate))
    if settings.steps:
        loss = ModelLoss(
            model,
            objective,
            settings.precision,
            checkpointing=settings.gradient_checkpointing,
            score_after=settings.marker(model.scheme),
            label=label,
        )
        phases.append(phase(MODEL, loss, settings, settings.accumulate))
    return phases
