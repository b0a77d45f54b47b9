"""A patcher: a patch ends after punctuation and white space, or when it is long."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from blt_core import BuildContext, Component, Rows, at_least, not_empty


@attrs.frozen(kw_only=True)
class CommasParams:
    """ends: ASCII characters after which a patch ends. max_patch_bytes: the longest patch."""

    ends: str = attrs.field(default=" ,.;:()\n", validator=not_empty())
    max_patch_bytes: int = attrs.field(default=12, validator=at_least(1))

    def __attrs_post_init__(self) -> None:
        if not self.ends.isascii():
            raise ValueError(f"ends: expected ASCII characters, got {self.ends!r}")


class Sizes:
    """Bytes of the open patch after each byte, of each text."""

    def __init__(self, batch: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(batch)]

    @property
    def lengths(self) -> list[int]:
        """Bytes read."""
        return [len(row) for row in self.rows]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget what comes after."""
        for row, length in zip(self.rows, lengths, strict=True):
            del row[length:]

    def settle(self, lengths: Sequence[int]) -> None:
        """Nothing is dropped."""

    def reorder(self, rows: Sequence[int]) -> None:
        """Texts that begin alike are read once."""
        self.rows = [list(self.rows[row]) for row in rows]


class Commas:
    """Flag i is a function of byte i and of how long its patch is by then."""

    def __init__(self, params: CommasParams, context: BuildContext) -> None:
        self.ends = {byte + context.scheme.byte_offset for byte in params.ends.encode()}
        self.max_patch_bytes = params.max_patch_bytes

    def new_cache(self, batch: int) -> Sizes:
        """An empty cache."""
        return Sizes(batch)

    def flags(self, rows: Rows, cache: Sizes | None) -> Tensor:
        """(b, r) bool: does the byte after each new one open a patch?"""
        cache = cache or Sizes(len(rows.lengths))
        flags_br = torch.zeros(rows.ids_br.shape, dtype=torch.bool)
        for b, count in enumerate(rows.lengths):
            sizes = cache.rows[b]
            for i, token in enumerate(rows.ids_br[b, :count].tolist()):
                size = sizes[-1] + 1 if sizes else self.max_patch_bytes  # BOS stands alone
                ends = token in self.ends or size >= self.max_patch_bytes
                flags_br[b, i] = ends
                sizes.append(0 if ends else size)
        return flags_br


COMMAS = Component("patcher", "acme/commas", Commas, CommasParams, "patches end after punctuation")
