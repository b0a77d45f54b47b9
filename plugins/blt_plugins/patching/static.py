"""The static patcher: patches of one fixed length."""

from __future__ import annotations

import attrs
from torch import Tensor

from blt_core.component import BuildContext, Component, at_least, overridable
from blt_core.types import Rows
from blt_plugins.patching.scan import PatchHistory, limited


@attrs.frozen(kw_only=True)
class StaticParams:
    """patch_bytes: the length of every patch after BOS."""

    patch_bytes: int = overridable(default=4, validator=at_least(1))


class StaticPatcher:
    """Every ``patch_bytes``-th byte after BOS opens a patch, as in MegaByte."""

    def __init__(self, params: StaticParams, context: BuildContext) -> None:
        self.patch_bytes = params.patch_bytes

    def new_cache(self, batch: int) -> PatchHistory[int]:
        """Remembers how many bytes were read."""
        return PatchHistory(batch)

    def flags(self, rows: Rows, cache: PatchHistory[int] | None) -> Tensor:
        """(b, r) bool: flag i + 1 for each new byte i."""
        return limited(rows, cache, None, self.patch_bytes)


STATIC = Component(
    kind="patcher",
    name="static",
    factory=StaticPatcher,
    params=StaticParams,
    summary="patches of a fixed number of bytes",
)
