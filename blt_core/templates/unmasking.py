"""An unmasking rule: the surest bytes of a block, so many at a time.

Change ``Surest.select``. At least one masked byte of each text that has any must be chosen, each
text for itself; what is left to chance comes from ``draws``, at the positions of the bytes.

Try it:    blt plugins test unmasking acme/name
Contracts: docs/kinds/unmasking.md
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from blt_core import BuildContext, Component, at_least, hookimpl
from blt_core.types import Draws

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class SurestParams:
    """bytes_per_pass: how many bytes of a block are filled in a pass."""

    bytes_per_pass: int = attrs.field(default=2, validator=at_least(1))


class Surest:
    """The masked bytes whose likeliest id is likeliest; the leftmost of equals."""

    def __init__(self, params: SurestParams, context: BuildContext) -> None:
        self.bytes_per_pass = params.bytes_per_pass

    def select(
        self, probs_bBV: Tensor, masked_bB: Tensor, starts: Sequence[int], draws: Draws
    ) -> Tensor:
        """(b, B) bool: the masked bytes to fill now."""
        sure_bB = probs_bBV.amax(-1).masked_fill(~masked_bB, -1.0)
        order_bB = sure_bB.sort(dim=-1, descending=True, stable=True).indices
        chosen_bB = torch.zeros_like(masked_bB)
        chosen_bB = chosen_bB.scatter(-1, order_bB[:, : self.bytes_per_pass], True)
        return chosen_bB & masked_bB


@hookimpl
def blt_components() -> list[Component]:
    """The rule."""
    return [Component("unmasking", NAME, Surest, SurestParams, "the surest bytes first")]
