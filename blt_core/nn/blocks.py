"""How block rows attend, by where their keys are and on which device.

Cached keys are few, and one mask over them serves all blocks. Whole sequences, as in training, are
long: each block looks at its own stretch of them, in tiles or, where there is a kernel for it, by
flex attention. All ways give the same numbers.

Axes: b batch rows, n blocks, B rows of a block, t clean key rows, h heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from blt_core.nn import flex
from blt_core.nn.attention import attend_blocks, joined
from blt_core.nn.masks import block_masks
from blt_core.nn.packing import take_rows
from blt_core.nn.tiles import BlockTiles
from blt_core.types import Blocks


class BlockSight(Protocol):
    """What the rows of some blocks see; made once for all layers."""

    def attend(
        self, q: Tensor, own_k: Tensor, own_v: Tensor, clean_k: Tensor, clean_v: Tensor
    ) -> Tensor:
        """Block rows (b, n, B, h, d) over clean keys (b, t, h, d) and their own block."""


@attrs.frozen(eq=False)
class BlockMasks:
    """Blocks over cached rows: seen_bnBt and own_bnBB are those of ``block_masks``."""

    seen_bnBt: Tensor
    own_bnBB: Tensor | None

    def attend(
        self, q: Tensor, own_k: Tensor, own_v: Tensor, clean_k: Tensor, clean_v: Tensor
    ) -> Tensor:
        """See ``BlockSight``."""
        return attend_blocks(q, own_k, own_v, clean_k, clean_v, self.seen_bnBt, self.own_bnBB)


class BlockSpan:
    """What bare layers ask of one masked block of each batch row, over the rows of a cache.

    See ``blt_core.nn.bare`` and :class:`BlockLanes`.
    """

    packing: None = None
    from_start = False

    def __init__(
        self, start_b1: Tensor, keys_bt: Tensor, size: int, window: int | None, dtype: torch.dtype
    ) -> None:
        """start_b1: of the blocks, of ``size`` bytes. keys_bt: positions that places stand for.

        dtype: of the queries.
        """
        self.window = window
        hidden = ~block_masks(start_b1, None, size, keys_bt[:, None], window)[0]
        bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        bias = bias.masked_fill(hidden, float("-inf"))
        self._bias = functional.pad(bias.expand(-1, -1, size, -1), (0, size))

    def bias(self, _: torch.dtype) -> Tensor:
        """(b, 1, B, t + B): 0 where a row sees a place of the cache or of its block, else -inf."""
        return self._bias


class BlockLanes:
    """What bare layers ask of a cache, for a block that is to leave it as it is.

    read: (b, t, 2g, d) of a lane.
    """

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._read, self._own = read, dict[str, Tensor]()

    def write(self, lane: str, _: BlockSpan, values_bB: Tensor, *, heads: bool = False) -> None:
        """Keep the rows of the block (b, B, 2g, d) for as long as this is kept."""
        self._own[lane] = values_bB

    def read(self, lane: str, _: BlockSpan) -> Tensor:
        """(b, t + B, 2g, d): what the cache has, and the block."""
        return joined(self._read(lane), self._own[lane])


def whole_sight(
    blocks: Blocks, *, window: int | None, rows: int, dtype: torch.dtype = torch.float32
) -> BlockSight:
    """What blocks over whole sequences of ``rows`` clean rows see; ``dtype``: of their queries."""
    size, start_bn, causal_bn = blocks.ids_bnB.shape[2], blocks.start_bn, blocks.causal_bn
    if flex.is_available(start_bn.device):
        return flex.FlexBlocks.plan(start_bn, causal_bn, size=size, window=window, rows=rows)
    return BlockTiles.plan(start_bn, causal_bn, size=size, window=window, rows=rows, dtype=dtype)


def sort_blocks(blocks: Blocks) -> tuple[Blocks, Tensor]:
    """The blocks of each batch row by their starts, and the order (b, n) that sorts them."""
    order_bn = blocks.start_bn.argsort(1)
    causal_bn = None if blocks.causal_bn is None else take_rows(blocks.causal_bn, order_bn)
    return Blocks(
        take_rows(blocks.ids_bnB, order_bn),
        take_rows(blocks.start_bn, order_bn),
        take_rows(blocks.latent_bn, order_bn),
        causal_bn,
    ), order_bn
