"""The autoregressive objective: the next byte, in the layout that generation uses.

Axes: b batch rows, r byte rows, V ids.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from blt_core.component import BuildContext, Component
from blt_core.model import Model
from blt_core.protocols import UNSCORED
from blt_core.types import Rows


@attrs.frozen(kw_only=True)
class NextByteParams:
    """Nothing to set."""


class NextByte:
    """Mean next-byte cross-entropy over all scored rows of a batch (Fast BLT, L_clean)."""

    def __init__(self, params: NextByteParams, context: BuildContext) -> None:
        """Keeps no state."""

    def loss(
        self,
        model: Model,
        rows: Rows,
        flags_br: Tensor,
        targets_br: Tensor,
        rng: torch.Generator,
    ) -> tuple[Tensor, dict[str, float]]:
        """(loss in nats a byte, figures to log)."""
        output = model.forward(rows, flags_br).clean
        if output is None:
            raise ValueError("the decoder gave no output for clean rows")
        return next_byte_loss(output.logits, targets_br), {}


def next_byte_loss(logits_brV: Tensor, targets_br: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of the rows whose target is not UNSCORED."""
    return functional.cross_entropy(
        widened(logits_brV).flatten(0, 1), targets_br.flatten(), ignore_index=UNSCORED
    )


def widened(logits: Tensor) -> Tensor:
    """Logits in float32 at least, themselves where they are: a loss in bfloat16 has three digits.

    Autocast widens them by itself; weights that are bfloat16 give bfloat16 logits without it.
    """
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


NEXT_BYTE = Component(
    kind="objective",
    name="ar",
    factory=NextByte,
    params=NextByteParams,
    summary="next-byte cross-entropy",
)
