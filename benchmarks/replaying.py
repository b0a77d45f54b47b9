"""Replayed acceptance: drafting at a shape without trained weights, as right as a trained model is.

For benchmarks alone; the figures that they give are hypothetical. With random weights no draft is
right. So each part of a sampler here does all of its work, and only ids are replaced: drafts are
``ar``'s own text with errors, which follow the acceptance by place that a trained model showed;
patches have the lengths that its patches had. One text at a time.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from blt_core.protocols import DecodeOps, Drafter, Patcher, Verification
from blt_core.types import Draft, Draws, Rows, Sampling, matches

#: Steps of these sizes around a circle meet all parts of it evenly, so short runs have few
#: accidents; two of them, since what is drawn by one step alike goes together.
LUCK, SIZE = 0.6180339887498949, 0.41421356237309515


def even(begin: float, step: float) -> Iterator[float]:
    """Numbers in [0, 1) that are spread evenly, however many are taken."""
    at = begin
    while True:
        at = (at + step) % 1.0
        yield at


@attrs.frozen
class Acceptance:
    """How drafts of a trained model went.

    lengths: how many drafts were so long. by_place: for place 1, 2, …: of the drafts that reach it
    and stood before it, the share that stood there too.
    """

    lengths: dict[int, int]
    by_place: tuple[float, ...]

    @classmethod
    def of(cls, drafts: Sequence[tuple[int, int]]) -> Acceptance:
        """Of (drafted, stood) of each draft."""
        longest = max((size for size, _ in drafts), default=0)
        shares = []
        for place in range(1, longest + 1):
            reached = [stood for size, stood in drafts if size >= place and stood >= place - 1]
            shares.append(sum(n >= place for n in reached) / len(reached) if reached else 0.0)
        return cls(dict(sorted(Counter(size for size, _ in drafts).items())), tuple(shares))

    def stood(self, size: int, luck: float) -> int:
        """How much of a draft stands: more with more luck, in [0, 1)."""
        share, count = 1.0, 0
        for each in self.by_place[:size]:
            share *= each
            if 1 - luck > share:
                break
            count += 1
        return count

    def length(self, luck: float) -> int:
        """How long a draft is."""
        sizes, total = list(self.lengths), sum(self.lengths.values())
        ends, at = [], 0
        for size in sizes:
            at += self.lengths[size]
            ends.append(at / total)
        return sizes[min(bisect_right(ends, luck), len(sizes) - 1)]


class Script:
    """What the next round drafts: ``ar``'s text, and from some place on other ids.

    text: the ids of a text and of ``ar``'s continuation, BOS first. free: whether a draft's length
    is the trained model's too, and not what the drafter asks for.
    """

    def __init__(self, text: Sequence[int], outer: Acceptance, *, free: bool) -> None:
        self.text, self.outer, self.free = text, outer, free
        self._luck, self._sizes = even(0.25, LUCK), even(0.5, SIZE)
        self.begin = self.stood = 0
        self.size: int | None = None

    def start(self, begin: int) -> None:
        """A round begins at a position."""
        self.begin = begin
        self.size = self.outer.length(next(self._sizes)) if self.free else None
        self.stood = self.outer.stood(len(self.text), next(self._luck))

    def at(self, position: int) -> int:
        """The id that is drafted for a position: an error where the draft does not stand."""
        own = self.text[position] if position < len(self.text) else 0
        return own if position < self.begin + self.stood else own ^ 1


class ScriptedOps:
    """The operations of a state, whose draft passes seem to say what the script says."""

    def __init__(self, ops: DecodeOps, script: Script) -> None:
        self._ops, self._script = ops, script

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def draft_logits(self, rows: Sequence[int]) -> Tensor:
        """The pass is run; its logits are replaced."""
        logits = self._ops.draft_logits(rows)
        [count], [length] = rows, self._ops.lengths
        ids = [self._script.at(length - count + 1 + i) for i in range(count)]
        told = torch.zeros_like(logits)
        told[0, torch.arange(count), torch.tensor(ids)] = 1.0
        return told

    draft = DecodeOps.draft  # of these draft_logits


class Replayed:
    """The drafter around a real one: its passes are run, and it drafts what the script says."""

    def __init__(self, inner: Drafter, script: Script) -> None:
        self.inner, self.script = inner, script
        #: (drafted, of them right) of each draft.
        self.drafts: list[tuple[int, int]] = []

    def draft(
        self, ops: DecodeOps, limit: Sequence[int], sampling: Sampling, draws: Draws
    ) -> Draft:
        """The inner drafter's draft, of scripted ids."""
        [begin], [most] = ops.lengths, limit
        self.script.start(begin)
        scripted: Any = ScriptedOps(ops, self.script)
        found = self.inner.draft(scripted, limit, sampling, draws)
        size = len(found.ids[0]) if self.script.size is None else min(self.script.size, most)
        ids = [self.script.at(begin + i) for i in range(size)]
        self.drafts.append((size, min(self.script.stood, size)))
        return Draft([ids])


class ReplayedProposals:
    """A drafter inside of a cascade: what it proposes is right as often as a trained model's."""

    def __init__(self, inner: Drafter, script: Script, acceptance: Acceptance) -> None:
        self.inner, self.script, self.acceptance = inner, script, acceptance
        self._luck, self._sizes = even(0.75, LUCK), even(0.0, SIZE)
        #: (begin of the round, what stood of the proposal) of each.
        self.stood: list[tuple[int, int]] = []

    def draft(
        self, ops: DecodeOps, limit: Sequence[int], sampling: Sampling, draws: Draws
    ) -> Draft:
        """Proposals that the cascade's decoder will accept as far as the trained model's did."""
        [begin], [most] = ops.lengths, limit
        self.inner.draft(ops, limit, sampling, draws)
        size = min(self.acceptance.length(next(self._sizes)), most)
        right = self.acceptance.stood(size, next(self._luck))
        ids = [self.script.at(begin + i) ^ (2 * (i >= right)) for i in range(size)]
        self.stood.append((self.script.begin, right))
        return Draft([ids])


class ReplayedVerification:
    """A real verification, whose answer is what the script says."""

    def __init__(self, inner: Verification, script: Script) -> None:
        self.inner, self.script = inner, script

    def check(self, sampling: Sampling) -> None:
        """As the inner one."""
        self.inner.check(sampling)

    def accept(
        self,
        draft: Draft,
        logits_brV: Tensor,
        positions: Sequence[int],
        active: Sequence[bool],
        sampling: Sampling,
        draws: Draws,
    ) -> tuple[list[int], list[int]]:
        """What agrees with ``ar``'s text, and its next id."""
        self.inner.accept(draft, logits_brV, positions, active, sampling, draws)
        [ids], [begin] = draft.ids, positions
        right = matches(ids, self.script.text[begin : begin + len(ids)])
        return [right], [self.script.text[begin + right]]


class ReplayedPatcher:
    """A real patcher, whose patches have given lengths, shuffled: those of a text go together."""

    def __init__(self, inner: Patcher, lengths: Sequence[int], size: int) -> None:
        self.inner = inner
        self.starts = {0, 1}  # BOS is a patch of its own
        mixed = random.Random(0).sample(lengths, len(lengths))
        at = 1
        while at < size:
            for length in mixed:
                at += length
                self.starts.add(at)

    def new_cache(self, batch: int) -> Any:
        """The inner patcher's."""
        return self.inner.new_cache(batch)

    def flags(self, rows: Rows, cache: Any) -> Tensor:
        """Whether the byte after each new one opens a patch."""
        first = [0] * len(rows.lengths) if cache is None else list(cache.lengths)
        found = self.inner.flags(rows, cache)
        given = [[begin + i + 1 in self.starts for i in range(found.shape[1])] for begin in first]
        return torch.tensor(given, device=found.device)


def passes_of(
    prompt: int, drafts: Sequence[tuple[int, int]], refills: Sequence[int], starts: set[int]
) -> tuple[int, int]:
    """N_dec and N_enc in closed form, of a prompt (BOS included) and the rounds after it.

    drafts: (drafted, accepted) of each round. refills: decoder passes of each draft.
    """
    decoder = encoder = 1
    known, length = prompt, prompt + 1
    for (size, stood), passes in zip(drafts, refills, strict=True):
        decoder += passes + 1
        encoder += any(at in starts for at in range(known + 1, length + size + 1))
        known = length + stood
        length += stood + 1
    return decoder, encoder


def refills_of(size: int, stood: Sequence[int]) -> int:
    """Decoder passes of a cascade's draft: each adds what stood of a proposal, and an id."""
    left, passes, proposals = size, 0, iter(stood)
    while left > 0:
        left -= (min(next(proposals), left - 1) if left > 1 else 0) + 1
        passes += 1
    return passes
