"""The two phases of a training run: the byte scorer, then the model over its patches."""

from __future__ import annotations

import hashlib

import attrs
import torch
from torch import nn

from blt_core.model import Model
from blt_core.nn import gradient_checkpointing
from blt_core.protocols import ByteScorer, Documents, Objective, ThresholdPatcher
from blt_plugins.training.data.order import Batches
from blt_plugins.training.data.windows import Batch, Windows
from blt_plugins.training.objectives.figures import Loss, checked_loss
from blt_plugins.training.objectives.next_byte import next_byte_loss
from blt_plugins.training.setup.schedule import Schedule
from blt_plugins.training.setup.settings import Precision, ScorerSettings, TrainSettings

SCORER, MODEL = "scorer", "model"
#: Where metrics are logged that lie between the two: the scorer's score, the calibration.
PATCHES = "patches"


class ScorerLoss(nn.ModuleDict):
    """The byte scorer's next-byte loss; its parameters have the names that a model gives them."""

    def __init__(self, scorer: TrainableScorer) -> None:
        super().__init__({"patcher": nn.ModuleDict({"byte_scorer": scorer.module})})
        self._logits = scorer.part.logits

    def forward(self, batch: Batch, rng: torch.Generator) -> Loss:  # type: ignore[override]
        """The loss of one batch."""
        return next_byte_loss(self._logits(batch.rows, None), batch.targets_br), {}


class ModelLoss(nn.ModuleDict):
    """An objective's loss over all parts but the patcher, which sees no gradient.

    precision "bfloat16": matrix products and the like run in bfloat16, by autocast; parameters,
    their gradients and the optimizer stay float32, and so do patches. label: how messages name the
    objective. Raises PluginError where what it gives is no loss with figures.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        precision: Precision,
        *,
        checkpointing: bool,
        label: str = "the objective",
    ) -> None:
        parts = {name: part for name, part in model.modules().items() if name != "patcher"}
        super().__init__(parts)
        self._model, self._objective, self._label = model, objective, label
        self._autocast, self._checkpointing = precision == "bfloat16", checkpointing

    def forward(self, batch: Batch, rng: torch.Generator) -> Loss:  # type: ignore[override]
        """The loss of one batch; random choices are drawn from ``rng``."""
        model, rows, flags = self._model, batch.rows, batch.opens_br
        if flags is None:
            with torch.no_grad():
                flags = model.patcher.flags(rows, None)
        kind = rows.ids_br.device.type
        with (
            # Its cache of narrowed weights would be shared with passes in other threads.
            torch.autocast(kind, torch.bfloat16, enabled=self._autocast, cache_enabled=False),
            gradient_checkpointing(active=self._checkpointing),
        ):
            found = self._objective.loss(model, rows, flags, batch.targets_br, rng)
        return checked_loss(found, self._label)


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
            label=label,
        )
        phases.append(phase(MODEL, loss, settings, settings.accumulate))
    return phases


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
