"""Unmasking rules around other rules.

Axes: b batch rows, B bytes of a block, V ids; see :mod:`blt_plugins.unmasking.rules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from blt_core.component import BuildContext, Component, abilities_of, at_least, nested, nested_table
from blt_core.decoding.denoising import select
from blt_core.protocols import Unmasking
from blt_core.types import Draws
from blt_plugins.unmasking.rules import IN_ORDER


@attrs.frozen(kw_only=True)
class AtMostParams:
    """count: bytes that a pass fills at most. rule: says which may be filled."""

    count: int = attrs.field(default=4, validator=at_least(1))
    rule: Unmasking = nested("unmasking", default="all")


class AtMost:
    """Of the bytes that a rule would fill, the most confident ones; the first of equal ones."""

    def __init__(self, params: AtMostParams, context: BuildContext) -> None:
        self.count, self.rule = params.count, params.rule

    def select(
        self, probs_bBV: Tensor, masked_bB: Tensor, starts: Sequence[int], draws: Draws
    ) -> Tensor:
        """(b, B) bool."""
        chosen = select(self.rule, probs_bBV, masked_bB, starts, draws)
        top = probs_bBV.amax(-1).masked_fill(~chosen, -1.0)
        best = top.sort(dim=-1, descending=True, stable=True).indices[:, : self.count]
        return torch.zeros_like(chosen).scatter(-1, best, True) & chosen


@attrs.frozen(kw_only=True)
class LeftToRightParams:
    """rule: says which bytes may be filled."""

    rule: Unmasking = nested("unmasking", default="confidence")


class LeftToRight:
    """The first masked byte, and those after it without a gap that a rule would fill."""

    def __init__(self, params: LeftToRightParams, context: BuildContext) -> None:
        self.rule = params.rule

    def select(
        self, probs_bBV: Tensor, masked_bB: Tensor, starts: Sequence[int], draws: Draws
    ) -> Tensor:
        """(b, B) bool."""
        chosen = select(self.rule, probs_bBV, masked_bB, starts, draws)
        first = masked_bB & (masked_bB.cumsum(-1) == 1)
        # A byte that is filled already is no gap.
        run = (chosen | first | ~masked_bB).long().cumprod(-1).bool()
        return run & masked_bB


@attrs.frozen(kw_only=True)
class AnyOfParams:
    """rules: tables under names of your choice."""

    rules: Mapping[str, Unmasking] = nested_table("unmasking", example="rules.a.use = 'all'")


class AnyOf:
    """Every byte that one of several rules would fill."""

    def __init__(self, params: AnyOfParams, context: BuildContext) -> None:
        self.rules = tuple(params.rules.values())

    def select(
        self, probs_bBV: Tensor, masked_bB: Tensor, starts: Sequence[int], draws: Draws
    ) -> Tensor:
        """(b, B) bool."""
        chosen = torch.zeros_like(masked_bB)
        for rule in self.rules:
            chosen |= select(rule, probs_bBV, masked_bB, starts, draws)
        return chosen


def in_order_if_all(params: AnyOfParams) -> frozenset[str]:
    """In order where all of its rules are: each fills a run from the first masked byte on."""
    return frozenset.intersection(*map(abilities_of, params.rules.values())) & {IN_ORDER}


AT_MOST = Component(
    kind="unmasking",
    name="at-most",
    factory=AtMost,
    params=AtMostParams,
    summary="of the bytes that another rule fills, so many at most",
)
LEFT_TO_RIGHT = Component(
    kind="unmasking",
    name="left-to-right",
    factory=LeftToRight,
    params=LeftToRightParams,
    summary="from the first masked byte on, as far as another rule fills",
    provides=lambda _: frozenset({IN_ORDER}),
)
ANY_OF = Component(
    kind="unmasking",
    name="any-of",
    factory=AnyOf,
    params=AnyOfParams,
    summary="every byte that one of several rules fills",
    provides=in_order_if_all,
)
