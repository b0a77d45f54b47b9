"""How bytes and special symbols map to ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import attrs


@attrs.frozen
class IdScheme:
    """How bytes and special symbols map to ids: byte v is id ``byte_offset + v``.

    ``size`` is V, the number of ids. ``mask`` is None where a model has no [MASK] entry.
    ``outputs_specials``: whether ids that stand for no byte may be output; they count as bytes
    towards a request's length, are read on, and show as nothing.
    """

    byte_offset: int = 0
    bos: int = 256
    eos: int = 257
    mask: int | None = 258
    size: int = 259
    outputs_specials: bool = False

    def encode(self, data: bytes) -> list[int]:
        """Ids of ``data``, without BOS."""
        return [value + self.byte_offset for value in data]

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes among ``ids``; special ids stand for no byte and are left out."""
        first, last = self.byte_offset, self.byte_offset + 256
        return bytes(i - first for i in ids if first <= i < last)

    def is_byte(self, token: int) -> bool:
        """Whether ``token`` stands for a byte."""
        return self.byte_offset <= token < self.byte_offset + 256

    @property
    def never_output(self) -> tuple[int, ...]:
        """Ids that a model may read but must not produce: [MASK], and maybe other specials."""
        return _never_output(self)


@cache
def _never_output(scheme: IdScheme) -> tuple[int, ...]:
    if scheme.outputs_specials:
        return () if scheme.mask is None else (scheme.mask,)
    return tuple(i for i in range(scheme.size) if not scheme.is_byte(i) and i != scheme.eos)
