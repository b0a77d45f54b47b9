"""Asking drafters and verifications, with a check of what they answer.

Samplers and drafters that hold another drafter call these, so that a broken one is named wherever
it is nested. Axes: b batch rows, r rows of a pass, V ids.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import cast

from torch import Tensor

from blt_core.faults import broken
from blt_core.protocols import DecodeOps, Drafter, StoppingDrafter, Verification
from blt_core.types import Draft, Draws, Sampling, StopRule

_PROPOSES, _PROBABILITIES = "drafter.proposes", "drafter.probabilities"
_DECIDES = "verification.decides"


def propose(
    drafter: Drafter,
    ops: DecodeOps,
    limit: Sequence[int],
    sampling: Sampling,
    draws: Draws,
    rule: StopRule | None = None,
) -> Draft:
    """What a drafter proposes, cut to ``limit`` ids a batch row.

    rule: ends rows early; for drafters that can be told so. Raises ComponentError, which names the
    drafter, for what is no draft of ids.
    """
    if rule is None:
        draft: object = drafter.draft(ops, limit, sampling, draws)
    else:
        draft = cast("StoppingDrafter", drafter).draft(ops, limit, sampling, draws, rule)
    if not isinstance(draft, Draft):
        text = f"proposed {draft!r}; expected a Draft of {len(limit)} batch rows"
        raise broken(drafter, text, _PROPOSES)
    try:
        ids = [[operator.index(token) for token in row[:most]]
               for row, most in zip(draft.ids, limit, strict=True)]  # fmt: skip
    except (TypeError, ValueError) as error:
        text = f"proposed {draft.ids!r}; expected lists of ids for {len(limit)} batch rows"
        raise broken(drafter, text, _PROPOSES) from error
    for row in ids:
        if not all(0 <= token < ops.scheme.size for token in row):
            text = f"proposed {row}; these are not all ids below {ops.scheme.size}"
            raise broken(drafter, text, _PROPOSES)
    found = Draft(ids, draft.probs_bkV)
    if found.probs_bkV is not None:
        _check_probs(drafter, found, ops.scheme.size)
    return found


def draft_alone(
    ops: DecodeOps, limits: Sequence[int], sampling: Sampling, draws: Draws
) -> list[list[int]]:
    """The ids of ``ops.draft``: what the decoder alone writes, at most ``limits[b]`` a batch row.

    Operations around others may pass on what they do not name, and then their ``draft`` would not
    be made of their own ``draft_logits``. So it is asked for only where their class defines it,
    and not before its ``draft_logits``; of any others the default is taken.
    """
    for each in type(ops).__mro__:
        if "draft" in vars(each):
            return ops.draft(limits, sampling, draws)
        if "draft_logits" in vars(each):
            break
    return DecodeOps.draft(ops, limits, sampling, draws)


def _check_probs(drafter: Drafter, draft: Draft, size: int) -> None:
    """Raise ComponentError unless a draft tells what each of its ids was drawn from."""
    probs, longest = draft.probs_bkV, max(map(len, draft.ids), default=0)
    shape = tuple(probs.shape) if isinstance(probs, Tensor) else None
    fits = shape is not None and len(shape) == 3 and shape[1] >= longest  # noqa: PLR2004 -- b, k, V
    if not fits or shape is None or (shape[0], shape[2]) != (len(draft.ids), size):
        wanted = (len(draft.ids), longest, size)
        text = f"gave probabilities of shape {shape}; expected {wanted}"
        raise broken(drafter, text, _PROBABILITIES)
    at = [(row, place, token) for row, ids in enumerate(draft.ids)
          for place, token in enumerate(ids)]  # fmt: skip
    if not at or probs is None:
        return
    possible = (probs[tuple(zip(*at, strict=True))] > 0).tolist()
    for (row, _, _), drawn in zip(at, possible, strict=True):
        if not drawn:
            text = f"drafted {draft.ids[row]}, of which some have a probability of 0"
            raise broken(drafter, text, _PROBABILITIES)


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
        raise broken(verification, _undecided(decision, draft), _DECIDES) from error
    if not fits:
        raise broken(verification, _undecided(decision, draft), _DECIDES)
    return accepted, own


def _undecided(decision: object, draft: Draft) -> str:
    sizes = [len(ids) for ids in draft.ids]
    return f"accepted {decision!r}; expected (counts up to {sizes}, an id for each batch row)"
