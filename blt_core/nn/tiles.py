"""Exact attention in tiles: a few queries at a time over the run of keys that they see.

Windows and blocks see a narrow band of all keys. A tile multiplies its queries with a view of that
band, so nothing is gathered, padded or repeated, and the scores of a tile fit into a CPU's cache.

Axes: x sequences (batch rows times heads), r query rows, t key rows, o a row's own keys, d width of
a head, b batch rows, n blocks, B rows of a block, h heads, g key/value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blt_core.nn.masks import block_masks

#: Query rows of a tile: few enough to waste little of a window, enough to fill a matrix product.
TILE_ROWS = 64
#: Likewise of blocks, whose keys lie more scattered.
BLOCK_TILE_ROWS = 96
#: Tiles begin at keys that leave them a multiple of this wide, if they can: a softmax over a row
#: whose end does not fill a vector takes twice as long.
_ALIGNED = 32
#: Tilings of windows that are kept, one for each number of rows.
_TILINGS = 64


@attrs.frozen(eq=False)
class Tile:
    """Query rows of some sequences, one run of keys, and which sees which: bias 0, else -inf."""

    sequences: slice
    rows: slice
    keys: slice
    bias_rt: Tensor


@attrs.frozen(eq=False)
class BlockTiles:
    """What block rows see, in tiles of neighbouring blocks: ``start_bn`` is best sorted.

    The query rows of a tile count through all blocks of a batch row. own_bias_bnBB: which rows of
    its block a row sees (None: all).
    """

    tiles: Sequence[Tile]
    own_bias_bnBB: Tensor | None

    @classmethod
    def plan(
        cls,
        start_bn: Tensor,
        causal_bn: Tensor | None,
        *,
        size: int,
        window: int | None,
        heads: int,
        dtype: torch.dtype = torch.float32,
    ) -> BlockTiles:
        """The tiles of blocks of ``size`` rows, for queries of ``dtype``; see ``block_masks``."""
        count = max(BLOCK_TILE_ROWS // size, 1)
        tiles = []
        for b, starts in enumerate(start_bn.tolist()):
            for n in range(0, len(starts), count):
                few = slice(n, min(n + count, len(starts)))
                low = 0 if window is None else min(starts[few]) - window
                keys = _aligned(low, max(starts[few]), own=size)
                positions = torch.arange(keys.start, keys.stop, device=start_bn.device)
                causal = None if causal_bn is None else causal_bn[b : b + 1, few]
                seen, _ = block_masks(
                    start_bn[b : b + 1, few], causal, size, positions[None, None], window
                )
                bias = _bias(seen[0].expand(-1, size, -1).flatten(0, 1), dtype)
                rows = slice(few.start * size, few.stop * size)
                tiles.append(Tile(slice(b * heads, (b + 1) * heads), rows, keys, bias))
        own = block_masks(start_bn, causal_bn, size, start_bn[..., None], window)[1]
        return cls(tiles, None if own is None else _bias(own, dtype))

    def attend(
        self, q: Tensor, own_k: Tensor, own_v: Tensor, clean_k: Tensor, clean_v: Tensor
    ) -> Tensor:
        """Block rows (b, n, B, h, d) over clean keys (b, t, h, d) and their own block.

        One softmax goes over the clean and the own scores of a row.
        """
        with torch.autocast(q.device.type, enabled=False):
            # (b, h, n, B, d) of a block's own rows.
            rows, own_keys, own_values = (x.movedim(3, 1).contiguous() for x in (q, own_k, own_v))
            own = (rows @ own_keys.transpose(-1, -2)) * q.shape[-1] ** -0.5
            if self.own_bias_bnBB is not None:
                own = own + self.own_bias_bnBB[:, None].to(own.dtype)
            clean, weights = _TileAttention.apply(  # type: ignore[no-untyped-call]
                rows.flatten(2, 3).flatten(0, 1),
                _by_head(clean_k),
                _by_head(clean_v),
                own.flatten(2, 3).flatten(0, 1),
                self.tiles,
            )
            out = clean.view(rows.shape) + weights.view(own.shape) @ own_values
        attended: Tensor = out.movedim(1, 3)
        return attended


def attend_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal window attention of whole sequences: (b, r, h, d) over (b, r, g, d)."""
    batch, rows, heads, dim = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        by_head = (_by_head(x) for x in (q, k, v))
        tiles = _window_tiles(rows, window, q.device, q.dtype)
        out, _ = _TileAttention.apply(*by_head, None, tiles)  # type: ignore[no-untyped-call]
    attended: Tensor = out.view(batch, heads, rows, dim).transpose(1, 2)
    return attended


@lru_cache(_TILINGS)
@torch.inference_mode(mode=False)  # training may meet what decoding has made
def _window_tiles(
    rows: int, window: int, device: torch.device, dtype: torch.dtype
) -> list[Tile]:
    tiles = []
    for first in range(0, rows, TILE_ROWS):
        last = min(first + TILE_ROWS, rows)
        keys = _aligned(first - window + 1, last)
        row = torch.arange(first, last, device=device)[:, None]
        ahead = row - torch.arange(keys.start, keys.stop, device=device)
        bias = _bias((ahead >= 0) & (ahead < window), dtype)
        tiles.append(Tile(slice(None), slice(first, last), keys, bias))
    return tiles


def _aligned(low: int, high: int, own: int = 0) -> slice:
    """Keys [low, high), and some before them, that with ``own`` further ones fill vectors."""
    return slice(max(low - (low - high - own) % _ALIGNED, 0), high)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return bias.masked_fill_(~seen, float("-inf"))


def _by_head(x: Tensor) -> Tensor:
    """(b, t, h, d) to (b·h, t, d)."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _keys_by_width(k: Tensor) -> Tensor:
    """(x, t, d) to (x, d, t), as a product takes it without a slow copy of its own."""
    return k.contiguous().transpose(1, 2)


class _TileAttention(torch.autograd.Function):
    """Queries (x, r, d) over (x, t, d), scaled by d^-½, in tiles that hold each query row once.

    own (x, r, o): further scores of each row, under the same softmax, or None. Gives (x, r, d) and
    the weights of the own scores: their values are up to the caller. Everything is in the dtype of
    the queries but what sums up: within a softmax or product, and of gradients over tiles.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, own: Tensor | None, tiles: Sequence[Tile]
    ) -> tuple[Tensor, Tensor | None]:
        out, kept, scale = torch.empty_like(q), [], q.shape[-1] ** -0.5
        own_weights = None if own is None else torch.empty_like(own)
        for tile in tiles:
            x, r, t = tile.sequences, tile.rows, tile.keys
            keys = _keys_by_width(k[x, t])
            scores = torch.baddbmm(tile.bias_rt.to(q.dtype), q[x, r], keys, alpha=scale)
            if own is not None:
                scores = torch.cat((scores, own[x, r]), -1)
            weights = scores.softmax(-1)
            clean = weights[..., : t.stop - t.start]
            out[x, r] = torch.bmm(clean, v[x, t])
            if own_weights is not None:
                own_weights[x, r] = weights[..., t.stop - t.start :]
            if any(ctx.needs_input_grad):
                kept.append(clean)
        ctx.save_for_backward(q, k, v, out, own_weights, *kept)
        ctx.tiles = tiles
        return out, own_weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_own: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, own_weights, *kept = ctx.saved_tensors
        grad, grad_q, scale = grad.contiguous(), torch.empty_like(q), q.shape[-1] ** -0.5
        wide = torch.promote_types(q.dtype, torch.float32)
        grad_k, grad_v = (torch.zeros(each.shape, dtype=wide, device=k.device) for each in (k, v))
        # The softmax's gradient: score = weight · (its gradient - their mean under the weights).
        mean = (grad * out).sum(-1, keepdim=True)
        if grad_own is not None:
            mean += (grad_own * own_weights).sum(-1, keepdim=True)
            grad_own = (grad_own - mean) * own_weights
        for tile, weights in zip(ctx.tiles, kept, strict=True):
            x, r, t = tile.sequences, tile.rows, tile.keys
            grad_scores = torch.bmm(grad[x, r], _keys_by_width(v[x, t]))
            grad_scores.sub_(mean[x, r]).mul_(weights)
            grad_q[x, r] = torch.bmm(grad_scores, k[x, t])
            grad_k[x, t] += torch.bmm(grad_scores.transpose(1, 2), q[x, r])
            grad_v[x, t] += torch.bmm(weights.transpose(1, 2), grad[x, r])
        grad_k = grad_k.mul_(scale).to(k.dtype)
        return grad_q.mul_(scale), grad_k, grad_v.to(v.dtype), grad_own, None
