"""The sizes of the blocks that a decoder is trained on."""

from __future__ import annotations

from collections.abc import Sequence

#: The key that holds them, of an objective and of a decoder.
BLOCKS = "block_bytes"


def block_sizes(block_bytes: int | Sequence[int] | None) -> tuple[int, ...]:
    """The sizes that an objective's ``block_bytes`` names, shortest first; none for None."""
    if block_bytes is None:
        return ()
    return tuple(sorted((block_bytes,) if isinstance(block_bytes, int) else block_bytes))
