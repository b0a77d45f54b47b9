"""Flex attention: fused kernels for windows and blocks on CUDA devices, in training.

Compiled once for each shape of tensors, so it is left to whole sequences. Both are imported where
they are first used, since most runs never do. Without ``compile`` the same functions run anywhere,
slowly and with all scores in memory.

Axes: b batch rows, h heads, g key/value heads, r query rows, t clean key rows, n blocks, B rows of
a block, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

#: Which query row of which batch row and head sees which key row.
MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

#: Masks of windows that are kept, one for each number of rows.
_MASKS = 64


def is_available(device: torch.device) -> bool:
    """Whether there are kernels for this device; only training is worth compiling them."""
    return device.type == "cuda" and torch.is_grad_enabled()


def attend_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal window attention of whole sequences: (b, r, h, d) over (b, r, g, d)."""
    return _attend(q, k, v, _window_mask(q.shape[1], window, q.device))


@lru_cache(_MASKS)
def _window_mask(rows: int, window: int, device: torch.device) -> BlockMask:
    def sees(_b: Tensor, _h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row) & (row - key < window)

    return _block_mask(sees, None, rows, rows, device)


@attrs.frozen(eq=False)
class FlexBlocks:
    """What block rows see of [clean rows; all block rows]."""

    mask: BlockMask

    @classmethod
    def plan(
        cls,
        start_bn: Tensor,
        causal_bn: Tensor | None,
        *,
        size: int,
        window: int | None,
        rows: int,
    ) -> FlexBlocks:
        """The mask of blocks of ``size`` rows beside ``rows`` clean rows; see ``block_masks``."""
        batch, count = start_bn.shape
        if causal_bn is None:
            causal_bn = torch.zeros_like(start_bn, dtype=torch.bool)
        reach = rows + size if window is None else window

        def sees(b: Tensor, _h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            block, place = row // size, row % size
            start, causal = start_bn[b, block], causal_bn[b, block]
            # Rows of a causal block stand behind one another, those of others all at the start.
            at = start + torch.where(causal, place + 1, 0)
            clean = (key < rows) & (key < start) & (at - key <= reach)
            other = key - rows  # places of keys among the block rows
            ahead = place - other % size
            own = (other >= 0) & (other // size == block)
            return clean | own & (~causal | (ahead >= 0) & (ahead < reach))

        mask = _block_mask(sees, batch, count * size, rows + count * size, start_bn.device)
        return cls(mask)

    def attend(
        self, q: Tensor, own_k: Tensor, own_v: Tensor, clean_k: Tensor, clean_v: Tensor
    ) -> Tensor:
        """Block rows (b, n, B, h, d) over clean keys (b, t, h, d) and their own block."""
        keys = torch.cat((clean_k, own_k.flatten(1, 2)), 1)
        values = torch.cat((clean_v, own_v.flatten(1, 2)), 1)
        return _attend(q.flatten(1, 2), keys, values, self.mask).view(q.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    out = _kernel("flex_attention", q.device)(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=mask,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    attended: Tensor = out.transpose(1, 2)
    return attended


def _block_mask(
    rule: MaskRule, batch: int | None, rows: int, keys: int, device: torch.device
) -> BlockMask:
    make = _kernel("create_block_mask", device)
    mask: BlockMask = make(rule, batch, None, rows, keys, device=device)
    return mask


@cache
def _kernel(name: str, device: torch.device) -> Callable[..., Any]:
    """A function of torch's flex attention, compiled where there are kernels."""
    from torch.nn.attention import flex_attention

    function: Callable[..., Any] = getattr(flex_attention, name)
    compiled: Callable[..., Any] = torch.compile(function, dynamic=True)
    return compiled if device.type == "cuda" else function
