"""A verification: drafted ids stand as far as the model would have drawn them itself.

Change ``Own.accept``. Whatever is drafted, texts must be those of ``ar`` with the same seed (or,
with ``draws_of_round = True``, have the model's own law); nothing is kept on ``self``.

Try it:    blt plugins test verification acme/name
Contracts: docs/kinds/verification.md
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from torch import Tensor

from blt_core import BuildContext, Component, Draft, Sampling, hookimpl
from blt_core.types import Draws, matches

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class OwnParams:
    """Takes no keys yet."""


class Own:
    """What ``replay`` does: the model draws as if nothing had been drafted."""

    def __init__(self, params: OwnParams, context: BuildContext) -> None:
        pass

    def check(self, sampling: Sampling) -> None:
        """Every setting is served; raise RequestError for one that is not."""

    def accept(
        self,
        draft: Draft,
        logits_brV: Tensor,
        positions: Sequence[int],
        active: Sequence[bool],
        sampling: Sampling,
        draws: Draws,
    ) -> tuple[list[int], list[int]]:
        """How many ids of each text stand, and the id after them; 0 and -1 for inactive ones."""
        rows = [len(ids) + 1 if on else 0 for ids, on in zip(draft.ids, active, strict=True)]
        chosen = sampling.picks(logits_brV, positions, rows, draws)
        accepted = [matches(ids, own) for ids, own in zip(draft.ids, chosen, strict=True)]
        after = [own[kept] if own else -1 for own, kept in zip(chosen, accepted, strict=True)]
        return accepted, after


@hookimpl
def blt_components() -> list[Component]:
    """The verification."""
    return [Component("verification", NAME, Own, OwnParams, "what the model draws itself")]
