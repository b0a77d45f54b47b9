"""An objective: the next byte's cross-entropy, against targets that are a little uncertain.

Change ``Smoothed.loss``. It is a mean over the rows whose target is not UNSCORED; random choices
come from ``rng`` alone; figures have the same names for every batch.

Try it:    blt plugins test objective acme/name
Contracts: docs/kinds/objective.md
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from blt_core import BuildContext, Component, Model, Rows, between, hookimpl
from blt_core.protocols import UNSCORED

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class SmoothedParams:
    """smoothing: the share of a target that is spread over all ids."""

    smoothing: float = attrs.field(default=0.05, validator=between(0, 0.5))


class Smoothed:
    """Cross-entropy with label smoothing; logs the plain one too."""

    def __init__(self, params: SmoothedParams, context: BuildContext) -> None:
        self.smoothing = params.smoothing

    def loss(
        self,
        model: Model,
        rows: Rows,
        flags_br: Tensor,
        targets_br: Tensor,
        rng: torch.Generator,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, in nats a byte, and figures for the log."""
        found = model.forward(rows, flags_br).clean
        if found is None:
            raise ValueError("the decoder gave nothing for clean rows")
        # EOS and the like are ids too: what is never output has finite logits here.
        logits, targets = found.logits.flatten(0, 1), targets_br.flatten()
        plain = functional.cross_entropy(logits, targets, ignore_index=UNSCORED)
        if not self.smoothing:
            return plain, {"plain": float(plain.detach())}
        even = -logits.log_softmax(-1).mean(-1)[targets != UNSCORED].mean()
        loss = (1 - self.smoothing) * plain + self.smoothing * even
        return loss, {"plain": float(plain.detach())}


@hookimpl
def blt_components() -> list[Component]:
    """The objective."""
    summary = "the next byte, with smoothed targets"
    return [Component("objective", NAME, Smoothed, SmoothedParams, summary)]
