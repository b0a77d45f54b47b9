"""The two phases of a training run: the byte scorer, then the model over its patches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import attrs
import torch
from torch import Tensor, nn

from blt_core.model import Model
from blt_core.protocols import ByteScorer, Documents, Objective, ThresholdPatcher
from blt_plugins.training.objective import next_byte_loss
from blt_plugins.training.order import Batches
from blt_plugins.training.schedule import Schedule
from blt_plugins.training.settings import ScorerSettings, TrainSettings
from blt_plugins.training.windows import Batch, Windows

SCORER, MODEL = "scorer", "model"
#: Where metrics are logged that lie between the two: the scorer's score, the calibration.
PATCHES = "patches"


@attrs.frozen(eq=False, kw_only=True)
class Phase:
    """What one phase trains, on what, and how fast.

    loss: nats a byte, and figures to log.
    """

    name: str
    module: nn.Module
    batches: Batches
    loss: Callable[[Batch, torch.Generator], tuple[Tensor, dict[str, float]]]
    accumulate: int
    schedule: Schedule
    seed: int

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.schedule.steps

    def seed_of(self, step: int) -> int:
        """The seed of the random choices of one step."""
        key = f"{self.seed}/{self.name}/{step}".encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:7], "big")


def make_phases(
    model: Model,
    objective: Objective,
    settings: TrainSettings,
    documents: Documents,
    windows: Windows,
) -> list[Phase]:
    """The phases of a run, in order; without a trainable scorer there is only one."""

    def schedule(of: TrainSettings | ScorerSettings) -> Schedule:
        return Schedule(
            steps=of.steps,
            peak=of.learning_rate,
            warmup_steps=of.warmup_steps,
            shape=settings.schedule,
            final_rate=settings.final_rate,
            decay_share=settings.decay_share,
        )

    def batches(name: str, size: int) -> Batches:
        return Batches(
            documents,
            windows,
            scheme=model.scheme,
            batch_bytes=size,
            seed=f"{settings.seed}/{name}",
            shuffle_bytes=settings.shuffle_bytes,
        )

    def model_loss(batch: Batch, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        flags = batch.opens_br
        if flags is None:
            with torch.no_grad():
                flags = model.patcher.flags(batch.rows, None)
        return objective.loss(model, batch.rows, flags, batch.targets_br, rng)

    parts = nn.ModuleDict({k: part for k, part in model.modules().items() if k != "patcher"})
    main = Phase(
        name=MODEL,
        module=parts,
        batches=batches(MODEL, max(settings.batch_bytes // settings.accumulate, 1)),
        loss=model_loss,
        accumulate=settings.accumulate,
        schedule=schedule(settings),
        seed=settings.seed,
    )
    scorer, own = trainable_scorer(model), settings.scorer
    if scorer is None or own.steps == 0:
        return [main]
    first = Phase(
        name=SCORER,
        module=scorer.module,
        batches=batches(SCORER, own.batch_bytes),
        loss=lambda batch, _: (
            next_byte_loss(scorer.part.logits(batch.rows, None), batch.targets_br),
            {},
        ),
        accumulate=1,
        schedule=schedule(own),
        seed=settings.seed,
    )
    return [first, main]


@attrs.frozen(eq=False)
class TrainableScorer:
    """One byte scorer, as what it does and as what holds its parameters."""

    part: ByteScorer
    module: nn.Module


def trainable_scorer(model: Model) -> TrainableScorer | None:
    """The byte scorer of a patcher that has one with parameters."""
    if not isinstance(model.patcher, ThresholdPatcher):
        return None
    part: ByteScorer = model.patcher.byte_scorer
    module: object = part
    return TrainableScorer(part, module) if isinstance(module, nn.Module) else None
