"""What drafters, samplers and the decode engine hand to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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

    def cut(self, limit: Sequence[int]) -> Draft:
        """This draft with at most ``limit[b]`` ids in each row."""
        ids = [row[:most] for row, most in zip(self.ids, limit, strict=True)]
        return Draft(ids, self.probs_bkV)


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
