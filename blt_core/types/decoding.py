"""What drafters, samplers and the decode engine hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import attrs

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(eq=False)
class OpenBlock:
    """A block being denoised, one per batch row; made by ``DecodeOps.open_block``.

    ids: for each batch row its B ids, committed bytes first, then [MASK] (a drafter fills them
    in; an inactive row has none). start: position of its first byte. given: how many of its bytes
    are committed already. provisional: whether the open patch is closed by force. scored: whether
    the flags of the text are brought up to date first. edits: of the state when it was opened; a
    block is good for that text only.
    """

    ids: list[list[int]]
    start: tuple[int, ...]
    given: tuple[int, ...]
    provisional: bool
    scored: bool = False
    edits: int = 0


#: Asked about the next k ids of a batch row before they are drafted: ``rule(row, beliefs_kV)``
#: tells how many of them are, given how likely each id is at each place, and whether the row's
#: draft goes on after them. It does not if they are fewer than k. A row that has ended is not asked
#: about again. How many are asked about at once may depend on draws of later ids too.
StopRule: TypeAlias = "Callable[[int, Tensor], tuple[int, bool]]"


def matches(drafted: Sequence[int], chosen: Sequence[int]) -> int:
    """How many drafted ids, from the first on, are those that were chosen."""
    pairs = enumerate(zip(drafted, chosen, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(drafted), len(chosen)))


@attrs.frozen(eq=False)
class Draft:
    """Proposed bytes: ``ids[b]`` of any length, and the q they were drawn from (b, k, V).

    ``probs_bkV`` is None for a draft that is made of the same draws as the model's own bytes, or of
    none: q is a point mass on each id.
    """

    ids: list[list[int]]
    probs_bkV: Tensor | None = None

    def probs(self, row: int, size: int) -> Tensor:
        """(k, ``size``): what a row's ids were drawn from; a point mass on each where q is None."""
        ids = self.ids[row]
        if self.probs_bkV is not None:
            return self.probs_bkV[row, : len(ids)]
        import torch

        probs = torch.zeros(len(ids), size, dtype=torch.float64)
        probs[torch.arange(len(ids)), torch.tensor(ids, dtype=torch.int64)] = 1.0
        return probs

    def cut(self, limit: Sequence[int]) -> Draft:
        """This draft with at most ``limit[b]`` ids in each row, and the q of no more places."""
        ids = [row[:most] for row, most in zip(self.ids, limit, strict=True)]
        longest = max(map(len, ids), default=0)
        return Draft(ids, None if self.probs_bkV is None else self.probs_bkV[:, :longest])


class AcceptanceLaw(NamedTuple):
    """What may happen to a draft of k ids, as probabilities in float64.

    stands_j: (k + 1), the probability that exactly j ids stand. next_jV: (k + 1, V), the law of the
    id that follows them, given that.
    """

    stands_j: Tensor
    next_jV: Tensor


@attrs.frozen
class Round:
    """What one sampler round committed, per batch row: ids, drafted and accepted counts.

    ``drafted`` counts all ids that were drafted, ``accepted`` those with which ``ids`` begins; the
    ids after them are the model's own (bonus or correction). ``prefill``: the round read the prompt
    and no more; it is not counted among the rounds.
    """

    ids: list[list[int]]
    drafted: list[int]
    accepted: list[int]
    prefill: bool = False


@attrs.frozen
class RoundCounts:
    """How rounds went: place j counts those that drafted, or accepted, j ids.

    committed: ids of all of them, the model's own included.
    """

    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    committed: int = 0

    @classmethod
    def of(cls, drafted: int, accepted: int, committed: int) -> RoundCounts:
        """One round."""
        return cls((0,) * drafted + (1,), (0,) * accepted + (1,), committed)

    def __add__(self, other: RoundCounts) -> RoundCounts:
        return RoundCounts(
            _sum(self.drafted, other.drafted),
            _sum(self.accepted, other.accepted),
            self.committed + other.committed,
        )

    @property
    def rounds(self) -> int:
        """How many rounds these are."""
        return sum(self.accepted)

    @property
    def bytes_per_round(self) -> float | None:
        """Ids that a round commits, on average; None without a round."""
        return self.committed / self.rounds if self.rounds else None

    @property
    def by_place(self) -> tuple[float, ...]:
        """For place 1, 2, …: the share of the drafts that reach so far which stand so far."""
        places = range(1, len(self.drafted))
        return tuple(sum(self.accepted[j:]) / sum(self.drafted[j:]) for j in places)


def _sum(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip_longest(one, other, fillvalue=0))
