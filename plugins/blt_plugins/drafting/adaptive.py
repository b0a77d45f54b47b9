"""A drafter that chooses how far to draft: so far that a byte is expected to cost least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
from torch import Tensor

from blt_core.component import (
    BuildContext,
    Component,
    abilities_of,
    at_least,
    nested,
)
from blt_core.decoding.drafting import propose
from blt_core.protocols import CostModel, DecodeOps, Drafter
from blt_core.published import SCALES
from blt_core.types import Draft, Draws, OpenBlock, Passes, Sampling, StopRule
from blt_plugins.drafting.forecast import Price, Prices, Record

#: Lengths to choose from, as far as ``max_bytes`` goes.
LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64)


@attrs.frozen(kw_only=True)
class AdaptiveParams:
    """drafter: drafts as many bytes as it is asked for. max_bytes: at most so many.

    cost: what is to be saved, as ``bandwidth`` (the weights that the model reads), ``roofline``
    (seconds on a machine that was measured) or ``per-pass`` (prices of your own) say; of passes
    over as many rows, with nothing before them. patch_bytes: mean length of patches, which says how
    often a round closes one.
    """

    drafter: Drafter = nested("drafter", default="self")
    max_bytes: int = attrs.field(default=32, validator=at_least(1))
    cost: CostModel = nested("cost_model", default="bandwidth")
    patch_bytes: float = attrs.field(default=4.0, validator=at_least(1))


class AdaptiveDrafter:
    """Has the inner drafter go on as far as a committed byte gets cheaper by it.

    One that can stop early is stopped where another pass is expected to cost more than it saves:
    how likely the draft stands so far is told by its top probabilities, and by how far those could
    be trusted before. Of any other the length is chosen beforehand, from the places of earlier
    drafts that stood and the passes that they took. So it is under verifications in law: where a
    pass ends may depend on draws of later bytes (blocks that are not filled in order propose them
    to a cascade). All is remembered for each text by itself, so a batch drafts what its rows would
    alone.
    """

    def __init__(self, params: AdaptiveParams, context: BuildContext) -> None:
        self.drafter = params.drafter
        sizes = context.parameters or SCALES["3b"]
        reads_bytes = "decoder.reads_byte_states" in context.abilities
        self._price = Price(params.cost, sizes, reads_bytes=reads_bytes)
        self.prices = Prices.of(self._price, params.patch_bytes, params.max_bytes)
        self._stops = "drafter.stops_early" in context.nested
        self._lengths = (*(n for n in LENGTHS if n < params.max_bytes), params.max_bytes)

    def draft(
        self,
        ops: DecodeOps,
        limit: Sequence[int],
        sampling: Sampling,
        draws: Draws,
        rule: StopRule | None = None,
    ) -> Draft:
        """As much of the inner drafter's draft as pays, for each row."""
        memory = ops.attach(self, lambda batch: Memory([Record(self.prices) for _ in range(batch)]))
        watched = self._stops and draws.begins is None
        asked = [0] * len(limit)
        for row, (record, most) in enumerate(zip(memory.rows, limit, strict=True)):
            if most:
                if record.draft:
                    record.learn(ops.text(row, record.begin))
                lengths = [*(n for n in self._lengths if n < most), min(most, self._lengths[-1])]
                asked[row] = record.choose(lengths, watched=watched)
        if not any(asked):
            return Draft([[] for _ in limit])
        begin = ops.lengths
        counted = Counted(ops, [0.0] * len(limit), self._price, self.prices.latent[0])

        def pays(row: int, beliefs_kV: Tensor) -> tuple[int, bool]:
            kept, goes_on = rule(row, beliefs_kV) if rule is not None else (len(beliefs_kV), True)
            worth = memory.rows[row].goes_on(beliefs_kV[:kept].amax(-1).tolist(), asked[row])
            return kept, goes_on and worth

        own_rule = pays if watched else rule
        draft = propose(self.drafter, counted, asked, sampling, draws, own_rule)
        for row, (record, most) in enumerate(zip(memory.rows, asked, strict=True)):
            if most:
                record.drafted(begin[row], most, draft.ids[row], counted.passes[row])
        return draft


class Memory:
    """The records of a batch, as a cache that follows the decode state.

    A rewind behind a draft's beginning forgets the draft; what was learnt stays.
    """

    def __init__(self, rows: Sequence[Record]) -> None:
        self.rows = rows

    @property
    def lengths(self) -> Sequence[int]:
        """Where the last draft of each row begins that is yet to be judged."""
        return [row.begin if row.draft else 0 for row in self.rows]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget drafts that began after ``lengths[b]`` ids."""
        for row, length in zip(self.rows, lengths, strict=True):
            if row.begin > length:
                row.draft = []

    def settle(self, lengths: Sequence[int]) -> None:
        """Nothing depends on it."""


class Counted:
    """A decode state that counts the passes of each row that drafts; all else is as it was.

    passes: by what they cost, in decoder passes of one row. latent: what a pass of encoder and
    global model costs.
    """

    def __init__(self, ops: DecodeOps, passes: list[float], price: Price, latent: float) -> None:
        self._ops, self.passes, self._price = ops, passes, price
        self._one, self._latent = price.of_rows(1), latent
        self._block: OpenBlock | None = None
        self._closed: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def draft_logits(self, rows: Sequence[int]) -> Any:
        """Counted."""
        self._count(rows, block=False)
        return self._ops.draft_logits(rows)

    draft = DecodeOps.draft  # of these draft_logits

    def denoise(self, block: OpenBlock, active: Sequence[bool] | None = None) -> Any:
        """Counted; of a block that closes the open patch by force, with the latent of that."""
        taking_part = active if active is not None else [bool(ids) for ids in block.ids]
        rows = [len(ids) * on for ids, on in zip(block.ids, taking_part, strict=True)]
        self._count(rows, block=True)
        if block is not self._block:
            self._block, self._closed = block, set()
        if block.provisional:
            for row in {row for row, count in enumerate(rows) if count} - self._closed:
                self.passes[row] += self._latent / self._one
                self._closed.add(row)
        return self._ops.denoise(block, active)

    def charge(self, passes: Sequence[Passes], call: Passes) -> None:
        """Counted."""
        for row, new in enumerate(passes):
            if new != Passes():
                self.passes[row] += self._price(new) / self._one
        self._ops.charge(passes, call)

    def _count(self, rows: Sequence[int], *, block: bool) -> None:
        for row, count in enumerate(rows):
            if count:
                self.passes[row] += self._price.of_rows(count, block=block) / self._one


def adaptive_abilities(params: AdaptiveParams) -> frozenset[str]:
    """Those of the inner drafter."""
    return abilities_of(params.drafter)


ADAPTIVE = Component(
    kind="drafter",
    name="adaptive",
    factory=AdaptiveDrafter,
    params=AdaptiveParams,
    summary="an inner drafter, for as many bytes as pay",
    provides=adaptive_abilities,
)
