"""A drafter: what followed the last time that the text stood as it stands now.

Change ``LastTime.draft``. Whatever it proposes, `speculative` outputs the bytes of ``ar``: a better
guess is only faster. At most ``limit[b]`` ids for text b, none where it is 0, and nothing kept on
``self``: one instance serves all texts (``ops.attach`` makes a cache that follows the text).

Try it:    blt plugins test drafter acme/name
Contracts: docs/kinds/drafter.md
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from blt_core import BuildContext, Component, DecodeOps, Draft, Sampling, at_least, hookimpl
from blt_core.types import Draws

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class LastTimeParams:
    """draft_bytes: how many are proposed at most. match_bytes: how many must have stood before."""

    draft_bytes: int = attrs.field(default=8, validator=at_least(1))
    match_bytes: int = attrs.field(default=3, validator=at_least(1))


class LastTime:
    """Looks the end of the text up in the text; proposes nothing where it is new."""

    def __init__(self, params: LastTimeParams, context: BuildContext) -> None:
        self.draft_bytes = params.draft_bytes
        self.match_bytes = params.match_bytes

    def draft(
        self, ops: DecodeOps, limit: Sequence[int], sampling: Sampling, draws: Draws
    ) -> Draft:
        """Ids for each text, as many as it has a limit for, and ``draft_bytes``, at most."""
        return Draft(
            [
                self._after(ops.text(row))[: min(most, self.draft_bytes)] if most else []
                for row, most in enumerate(limit)
            ]
        )

    def _after(self, ids: list[int]) -> list[int]:
        """The ids after the last place before the end where the end of the text stood."""
        end, size = ids[-self.match_bytes :], self.match_bytes
        for begin in range(len(ids) - size - 1, 0, -1):  # place 0 is BOS
            if ids[begin : begin + size] == end:
                return ids[begin + size :]
        return []


@hookimpl
def blt_components() -> list[Component]:
    """The drafter."""
    summary = "what followed when the text stood so before"
    return [Component("drafter", NAME, LastTime, LastTimeParams, summary)]
