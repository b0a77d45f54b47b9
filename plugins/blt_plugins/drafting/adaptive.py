"""A drafter that chooses how far to draft: so far that a byte is expected to cost least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from blt_core.component import (
    BuildContext,
    Component,
    abilities_of,
    at_least,
    more_than,
    nested,
)
from blt_core.decoding.drafting import propose
from blt_core.protocols import DecodeOps, Drafter
from blt_core.types import Draft, Draws, Passes, Sampling, StopRule, matches

#: Lengths to choose from, as far as ``max_bytes`` goes.
LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64)
#: What a round counts for one round later: some twenty rounds are remembered.
MEMORY = 0.95
# The next four were chosen by replaying drafts of both demos, on texts that no benchmark quotes.
#: How often a byte of a draft stands, before any was seen; counts for so many bytes of drafts.
USUAL, USUAL_BYTES = 0.92, 150.0
#: A place of a draft is believed to be like all of them, until so many rounds reached it.
PLACE_ROUNDS = 15.0
#: Decoder passes of a drafted byte before any was seen, believed like one draft of so many bytes.
SLOPE, SLOPE_BYTES = 0.4, 4.0
#: Without a draft, rounds until one is tried again; they double up to the last.
FIRST_PAUSE, LAST_PAUSE = 4, 128
#: The length of such a trial.
TRIAL = 2


@attrs.frozen(kw_only=True)
class AdaptiveParams:
    """drafter: drafts as many bytes as it is asked for. max_bytes: at most so many.

    decoder_price, latent_price, draft_price: of a decoder pass, of a pass of encoder and global
    model, and of a draft model's decoder pass with what goes with it, in any unit (default of the
    first two: bytes read at the 3B sizes of Fast BLT). patch_bytes: mean length of patches, which
    says how often a round closes one.
    """

    drafter: Drafter = nested("drafter", default="self")
    max_bytes: int = attrs.field(default=32, validator=at_least(1))
    decoder_price: float = attrs.field(default=1.0, validator=more_than(0))
    latent_price: float = attrs.field(default=17.8, validator=at_least(0))
    draft_price: float = attrs.field(default=1.0, validator=at_least(0))
    patch_bytes: float = attrs.field(default=4.0, validator=at_least(1))


class AdaptiveDrafter:
    """Asks the inner drafter for the length whose round costs least for each committed byte.

    What a length yields is estimated from which places of earlier drafts stood, its price from the
    decoder passes that earlier drafts took. Both are remembered for each text by itself, so a batch
    drafts what its rows would alone. How far is decided before a draft, from what came before it.
    """

    def __init__(self, params: AdaptiveParams, context: BuildContext) -> None:
        self.drafter = params.drafter
        self._prices = Prices(params.decoder_price, params.latent_price, params.patch_bytes)
        self._draft_pass = params.draft_price / params.decoder_price
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
        memory = ops.attach(self, lambda batch: Memory([Record() for _ in range(batch)]))
        asked = [0] * len(limit)
        for row, (record, most) in enumerate(zip(memory.rows, limit, strict=True)):
            if most:
                if record.draft:
                    record.learn(ops.text(row, record.begin))
                asked[row] = min(record.choose(self._lengths, self._prices), most)
        if not any(asked):
            return Draft([[] for _ in limit])
        begin, counted = ops.lengths, Counted(ops, [0.0] * len(limit), self._draft_pass)
        draft = propose(self.drafter, counted, asked, sampling, draws, rule)
        for row, (record, most) in enumerate(zip(memory.rows, asked, strict=True)):
            if most:
                record.drafted(begin[row], most, draft.ids[row], counted.passes[row])
        return draft


@attrs.frozen
class Prices:
    """What passes cost: of the decoder, and of encoder and global model."""

    decoder: float
    latent: float
    patch_bytes: float

    def of_round(self, draft_passes: float, committed: float) -> float:
        """A round with so many draft passes; one of the latent if its bytes close a patch."""
        closes = 1 - (1 - 1 / self.patch_bytes) ** committed
        return self.decoder * (1 + draft_passes) + self.latent * closes


@attrs.define
class Record:
    """What is known of one text's drafts.

    begin, asked, draft: of the last draft, until it is known what became of it. tried, stood: how
    often place j of a draft could have stood (all before it did), and did, with fading memory.
    """

    begin: int = 0
    asked: int = 0
    draft: list[int] = attrs.field(factory=list)
    tried: list[float] = attrs.field(factory=list)
    stood: list[float] = attrs.field(factory=list)
    # Of all places together. What is believed beforehand fades like the rest.
    all_tried: float = attrs.field(factory=lambda: USUAL_BYTES)
    all_stood: float = attrs.field(factory=lambda: USUAL_BYTES * USUAL)
    # Of drafts that were asked for: how many, their lengths, their passes, and the products.
    sums: list[float] = attrs.field(factory=lambda: _sums(SLOPE_BYTES, SLOPE * SLOPE_BYTES))
    pause: int = FIRST_PAUSE
    waited: int = 0

    def drafted(self, begin: int, asked: int, ids: Sequence[int], passes: float) -> None:
        """Note a draft and what it took."""
        self.begin, self.asked, self.draft = begin, asked, list(ids)
        new = _sums(asked, passes)
        self.sums = [MEMORY * old + each for old, each in zip(self.sums, new, strict=True)]
        if not ids:
            self._count(0, asked)

    def learn(self, text: Sequence[int]) -> None:
        """Note how much of the last draft is in the text that followed."""
        if text:
            self._count(matches(self.draft, text), self.asked)
        self.draft = []

    def _count(self, stood: int, asked: int) -> None:
        self.tried = [MEMORY * n for n in self.tried]
        self.stood = [MEMORY * n for n in self.stood]
        grow = stood + 1 - len(self.tried)
        self.tried += [0.0] * grow
        self.stood += [0.0] * grow
        for place in range(min(stood + 1, asked)):
            self.tried[place] += 1
            self.stood[place] += place < stood
        self.all_tried = MEMORY * self.all_tried + min(stood + 1, asked)
        self.all_stood = MEMORY * self.all_stood + min(stood, asked)

    def choose(self, lengths: Sequence[int], prices: Prices) -> int:
        """The length that pays best, from these; now and then a short one where none does."""
        bytes_of = self._expected(lengths[-1])
        best = min(
            lengths, key=lambda n: prices.of_round(self._passes(n), bytes_of[n]) / bytes_of[n]
        )
        if best:
            self.pause, self.waited = FIRST_PAUSE, 0
            return best
        self.waited += 1
        if self.waited < self.pause:
            return 0
        self.pause, self.waited = min(2 * self.pause, LAST_PAUSE), 0
        return min(TRIAL, lengths[-1])

    def _expected(self, most: int) -> list[float]:
        """Bytes that a round commits with drafts of 0 to ``most`` bytes."""
        usual = self.all_stood / self.all_tried
        found, reached = [1.0], 1.0
        for place in range(most):
            seen = place < len(self.tried)
            n, good = (self.tried[place], self.stood[place]) if seen else (0.0, 0.0)
            reached *= (good + PLACE_ROUNDS * usual) / (n + PLACE_ROUNDS)
            found.append(found[-1] + reached)
        return found

    def _passes(self, length: int) -> float:
        """Decoder passes of a draft of ``length`` bytes: a line through those that were made."""
        if not length:
            return 0.0
        count, lengths, passes, squares, products = self.sums
        count += 1  # a draft of no bytes, which takes no passes
        slope = (count * products - lengths * passes) / (count * squares - lengths * lengths)
        return max((passes + slope * (count * length - lengths)) / count, 0.0)


def _sums(asked: int, passes: float) -> list[float]:
    """What a draft adds to the sums of a line of passes over lengths."""
    return [1.0, asked, passes, asked * asked, asked * passes]


class Memory:
    """The records of a batch, as a cache that follows the decode state.

    A rewind behind a draft's beginning forgets the draft; what was learnt stays.
    """

    def __init__(self, rows: Sequence[Record]) -> None:
        self.rows = rows

    @property
    def lengths(self) -> Sequence[int]:
        """Where the last draft of each row begins that is yet to be judged."""
        return [row.begin + 1 if row.draft else 0 for row in self.rows]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget drafts that began after ``lengths[b]`` ids."""
        for row, length in zip(self.rows, lengths, strict=True):
            if row.begin > length:
                row.draft = []

    def settle(self, lengths: Sequence[int]) -> None:
        """Nothing depends on it."""


class Counted:
    """A decode state that counts the decoder passes of each row; all else is as it was.

    draft_pass: what a decoder pass of a draft model counts for.
    """

    def __init__(self, ops: DecodeOps, passes: list[float], draft_pass: float) -> None:
        self._ops, self.passes, self._draft_pass = ops, passes, draft_pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def draft_logits(self, rows: Sequence[int]) -> Any:
        """Counted."""
        self._count(rows)
        return self._ops.draft_logits(rows)

    def denoise(self, block: Any, active: Sequence[bool] | None = None) -> Any:
        """Counted."""
        self._count(active if active is not None else [bool(ids) for ids in block.ids])
        return self._ops.denoise(block, active)

    def charge(self, passes: Sequence[Passes], call: Passes) -> None:
        """Counted."""
        for row, new in enumerate(passes):
            self.passes[row] += self._draft_pass * new.draft
        self._ops.charge(passes, call)

    def _count(self, taking_part: Sequence[object]) -> None:
        self.passes[:] = [n + bool(on) for n, on in zip(self.passes, taking_part, strict=True)]


def adaptive_abilities(params: AdaptiveParams) -> frozenset[str]:
    """Those of the inner drafter."""
    return abilities_of(params.drafter)


ADAPTIVE = Component(
    kind="drafter",
    name="adaptive",
    factory=AdaptiveDrafter,
    params=AdaptiveParams,
    summary="an inner drafter, asked for as many bytes as pay",
    provides=adaptive_abilities,
)
