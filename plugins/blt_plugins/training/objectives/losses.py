"""The losses of the two phases of a run, as modules that a backend trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from blt_core.model import Model
from blt_core.nn import gradient_checkpointing
from blt_core.protocols import Objective
from blt_plugins.training.data.windows import Batch
from blt_plugins.training.objectives.figures import Loss, checked_loss
from blt_plugins.training.objectives.next_byte import next_byte_loss
from blt_plugins.training.setup.scorer import TrainableScorer
from blt_plugins.training.setup.settings import Precision

#: Names of the phases of a run.
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
    their gradients and the optimizer stay float32, and so do patches. score_after: ids after which
    a row is trained. label: how messages name the objective. Raises PluginError where what it gives
    is no loss with figures.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        precision: Precision,
        *,
        checkpointing: bool,
        score_after: Sequence[int] = (),
        label: str = "the objective",
    ) -> None:
        parts = {name: part for name, part in model.module_dict().items() if name != "patcher"}
        super().__init__(parts)
        self._model, self._objective, self._label = model, objective, label
        self._score_after = score_after
        self._autocast, self._checkpointing = precision == "bfloat16", checkpointing

    def forward(self, batch: Batch, rng: torch.Generator) -> Loss:  # type: ignore[override]
        """The loss of one batch; random choices are drawn from ``rng``."""
        model, rows, flags = self._model, batch.rows, batch.opens_br
        if flags is None:
            with torch.no_grad():
                flags = model.patcher.flags(rows, None)
        if self._score_after:
            batch = batch.after(self._score_after)
        kind = rows.ids_br.device.type
        with (
            # Its cache of narrowed weights would be shared with passes in other threads.
            torch.autocast(kind, torch.bfloat16, enabled=self._autocast, cache_enabled=False),
            gradient_checkpointing(active=self._checkpointing),
        ):
            found = self._objective.loss(model, rows, flags, batch.targets_br, rng)
        return checked_loss(found, self._label)
