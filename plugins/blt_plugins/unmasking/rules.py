"""The unmasking rules of block diffusion (Fast BLT, arXiv 2605.08044, BLT-D).

Axes: b batch rows, B bytes of a block, V ids. ``probs_bBV`` holds each byte's distribution,
``masked_bB`` the bytes still to fill; each rule fills at least one byte of a row that has any.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from blt_core.component import BuildContext, Component, at_least, between
from blt_core.types import Draws

#: The ability of rules that fill no byte later than one on its right.
IN_ORDER = "in_order"


@attrs.frozen(kw_only=True)
class AllParams:
    """Takes no keys."""


class FillAll:
    """Every masked byte at once: one decoder pass a block."""

    def __init__(self, params: AllParams, context: BuildContext) -> None:
        pass

    def select(
        self, probs_bBV: Tensor, masked_bB: Tensor, starts: Sequence[int], draws: Draws
    ) -> Tensor:
        """(b, B) bool: all masked bytes."""
        return masked_bB


@attrs.frozen(kw_only=True)
class ConfidenceParams:
    """alpha: probability above which a byte is filled."""

    alpha: float = attrs.field(default=0.7, validator=between(0, 1))


class Confidence:
    """Every byte whose top probability exceeds alpha, else the most confident one."""

    def __init__(self, params: ConfidenceParams, context: BuildContext) -> None:
        self.alpha = params.alpha

    def select(
        self, probs_bBV: Tensor, masked_bB: Tensor, starts: Sequence[int], draws: Draws
    ) -> Tensor:
        """(b, B) bool."""
        top = probs_bBV.amax(-1).masked_fill(~masked_bB, -1.0)
        best = torch.zeros_like(masked_bB).scatter(-1, top.argmax(-1, keepdim=True), True)
        return ((top > self.alpha) | best) & masked_bB


@attrs.frozen(kw_only=True)
class EntropyBoundParams:
    """gamma: nats that the entropies of the bytes filled together may sum to, less the largest."""

    gamma: float = attrs.field(default=1.5, validator=at_least(0))


class EntropyBound:
    """The longest run of bytes, by rising entropy, with sum(H) - max(H) <= gamma.

    So the least uncertain byte is always filled (EB sampler, arXiv 2505.24857).
    """

    def __init__(self, params: EntropyBoundParams, context: BuildContext) -> None:
        self.gamma = params.gamma

    def select(
        self, probs_bBV: Tensor, masked_bB: Tensor, starts: Sequence[int], draws: Draws
    ) -> Tensor:
        """(b, B) bool."""
        entropy = torch.special.entr(probs_bBV).sum(-1).masked_fill(~masked_bB, float("inf"))
        ordered, order = entropy.sort(dim=-1, stable=True)
        # In rising order the largest of a run is its last: sum - max is the sum before it.
        before = ordered.cumsum(-1).roll(1, dims=-1)
        before[..., 0] = 0.0
        return torch.zeros_like(masked_bB).scatter(-1, order, before <= self.gamma) & masked_bB


ALL = Component(
    kind="unmasking",
    name="all",
    factory=FillAll,
    params=AllParams,
    summary="every masked byte at once",
    provides=lambda _: frozenset({IN_ORDER}),
)
CONFIDENCE = Component(
    kind="unmasking",
    name="confidence",
    factory=Confidence,
    params=ConfidenceParams,
    summary="bytes likelier than alpha",
)
ENTROPY_BOUND = Component(
    kind="unmasking",
    name="entropy-bound",
    factory=EntropyBound,
    params=EntropyBoundParams,
    summary="as many bytes as an entropy budget allows",
)
