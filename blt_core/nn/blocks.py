"""How block rows attend, by where their keys are and on which device.

Cached keys are few, and one mask over them serves all blocks. Whole sequences, as in training, are
long: each block looks at its own stretch of them, in tiles or, where there is a kernel for it, by
flex attention. All ways give the same numbers.

Axes: b batch rows, n blocks, B rows of a block, t clean key rows, h heads, d width of a head.
"""

from __future__ import annotations

from typing import Protocol

import attrs
import torch
from torch import Tensor

from blt_core.nn import flex
from blt_core.nn.attention import attend_blocks
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
