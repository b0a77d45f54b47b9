"""The space patcher: a patch ends with the first space-like byte after a word."""

from __future__ import annotations

import attrs
from torch import Tensor

from blt_core.component import BuildContext, Component, at_least, overridable
from blt_core.types import IdScheme, Rows
from blt_plugins.patching.scan import PatchHistory, PatchState, scan


@attrs.frozen(kw_only=True)
class SpaceParams:
    """max_patch_bytes: a patch that has this many bytes ends as well (None: no limit)."""

    max_patch_bytes: int | None = overridable(default=None, validator=at_least(1))


class SpacePatcher:
    """A byte opens a patch after a space-like byte (BLT, section 2.2).

    Space-like is all but ASCII letters, digits and bytes of multi-byte UTF-8 characters. Runs of
    space-like bytes stay together with the word that follows: a patch holds a word byte first.
    """

    def __init__(self, params: SpaceParams, context: BuildContext) -> None:
        self.max_patch_bytes = params.max_patch_bytes
        self._word_ids = word_ids(context.scheme)

    def new_cache(self, batch: int) -> PatchHistory[PatchState]:
        """Remembers whether the open patch holds a word byte."""
        return PatchHistory(batch)

    def flags(self, rows: Rows, cache: PatchHistory[PatchState] | None) -> Tensor:
        """(b, r) bool: flag i + 1 for each new byte i."""

        def wants(_b: int, _i: int, token: int, _size: int, has_word: int) -> tuple[bool, int]:
            if token in self._word_ids:
                return False, 1
            return bool(has_word), has_word

        return scan(rows, cache, self.max_patch_bytes, wants)


_FIRST_NON_ASCII = 0x80


def word_ids(scheme: IdScheme) -> frozenset[int]:
    """Ids of the bytes that are part of words."""
    values = [v for v in range(256) if v >= _FIRST_NON_ASCII or chr(v).isalnum()]
    return frozenset(value + scheme.byte_offset for value in values)


SPACE = Component(
    kind="patcher",
    name="space",
    factory=SpacePatcher,
    params=SpaceParams,
    summary="a patch ends with the first space-like byte after a word",
)
