"""A patcher: a patch ends with a line, or when it is long enough.

Change ``Lines.flags``, and the cache if you look back at more than the length of the open patch.
Flag i of what is returned is about the byte *after* byte i, and may depend on no later one than i.

Try it:    blt plugins test patcher acme/name
Contracts: docs/kinds/patcher.md
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from blt_core import BuildContext, Component, ListCache, Rows, at_least, hookimpl

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class LinesParams:
    """max_patch_bytes: a patch that has this many bytes ends as well."""

    max_patch_bytes: int = attrs.field(default=8, validator=at_least(1))


class Lines:
    """A byte opens a patch after a line feed, and after ``max_patch_bytes`` bytes."""

    def __init__(self, params: LinesParams, context: BuildContext) -> None:
        self.max_patch_bytes = params.max_patch_bytes
        self._line_feed = ord("\n") + context.scheme.byte_offset

    def new_cache(self, batch: int) -> ListCache[int]:
        """An empty cache: how many bytes the open patch of each text had after each byte."""
        return ListCache(batch)

    def flags(self, rows: Rows, cache: ListCache[int] | None) -> Tensor:
        """(b, r) bool: for each new byte, whether the byte after it opens a patch."""
        cache = cache if cache is not None else ListCache(len(rows.lengths))
        flags_br = torch.zeros(rows.ids_br.shape, dtype=torch.bool)
        for b, count in enumerate(rows.lengths):
            sizes = cache.rows[b]
            for i, token in enumerate(rows.ids_br[b, :count].tolist()):
                first = not sizes  # BOS, a patch of its own
                size = sizes[-1] + 1 if sizes else 1
                ends = first or token == self._line_feed or size >= self.max_patch_bytes
                flags_br[b, i] = ends
                sizes.append(0 if ends else size)
        return flags_br


@hookimpl
def blt_components() -> list[Component]:
    """The patcher."""
    return [Component("patcher", NAME, Lines, LinesParams, "a patch ends with its line")]
