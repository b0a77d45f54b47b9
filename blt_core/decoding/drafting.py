"""Asking drafters and verifications, with a check of what they answer.

Samplers and drafters that hold another drafter call these, so that a broken one is named wherever
it is nested. Axes: b batch rows, r rows of a pass, V ids.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import Tensor

from blt_core.faults import broken
from blt_core.protocols import DecodeOps, Drafter, Verification
from blt_core.types import Draft, Draws, Sampling


def propose(
    drafter: Drafter, ops: DecodeOps, limit: Sequence[int], sampling: Sampling, draws: Draws
) -> Draft:
    """What a drafter proposes, cut to ``limit`` ids a batch row.

    Raises ComponentError, which names it, for what is no draft of ids.
    """
    draft = drafter.draft(ops, limit, sampling, draws)
    if not isinstance(draft, Draft):
        raise broken(drafter, f"proposed {draft!r}; expected a Draft of {len(limit)} batch rows")
    try:
        ids = [[operator.index(token) for token in row[:most]]
               for row, most in zip(draft.ids, limit, strict=True)]  # fmt: skip
    except (TypeError, ValueError) as error:
        text = f"proposed {draft.ids!r}; expected lists of ids for {len(limit)} batch rows"
        raise broken(drafter, text) from error
    for row in ids:
        if not all(0 <= token < ops.scheme.size for token in row):
            raise broken(drafter, f"proposed {row}; these are not all ids below {ops.scheme.size}")
    return Draft(ids, draft.probs_bkV)


def verify(
    verification: Verification,
    draft: Draft,
    logits_brV: Tensor,
    positions: Sequence[int],
    active: Sequence[bool],
    sampling: Sampling,
    draws: Draws,
) -> tuple[list[int], list[int]]:
    """(accepted ids of each batch row, the model's own id after them), as a verification decides.

    Raises ComponentError, which names it, for counts beyond the draft or of another batch.
    """
    decision = verification.accept(draft, logits_brV, positions, active, sampling, draws)
    try:
        accepted, own = ([operator.index(n) for n in numbers] for numbers in decision)
        fits = all(
            0 <= count <= len(ids) for count, ids in zip(accepted, draft.ids, strict=True)
        ) and all(token >= 0 or not on for token, on in zip(own, active, strict=True))
    except (TypeError, ValueError) as error:
        raise broken(verification, _undecided(decision, draft)) from error
    if not fits:
        raise broken(verification, _undecided(decision, draft))
    return accepted, own


def _undecided(decision: object, draft: Draft) -> str:
    sizes = [len(ids) for ids in draft.ids]
    return f"accepted {decision!r}; expected (counts up to {sizes}, an id for each batch row)"
