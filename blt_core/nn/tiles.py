"""Exact attention in tiles: a few queries at a time over the run of keys that they see.

Windows and blocks see a narrow band of all keys. A tile multiplies its queries with a view of that
band, so nothing is gathered, padded or repeated, and the scores of a tile fit into a CPU's cache.

Axes: x sequences (batch rows times heads), r query rows, t key rows, o a row's own keys, d width of
a head, b batch rows, n blocks, B rows of a block, h heads, g key/value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blt_core.nn.masks import block_masks

#: Query rows of a tile: few enough to waste little of a window, enough to fill a matrix product.
TILE_ROWS = 64
#: Tiles begin at keys that leave them a multiple of this wide, if they can: a softmax over a row
#: whose end does not fill a vector takes twice as long.
_ALIGNED = 32


@attrs.frozen(eq=False)
class Tile:
    """Query rows of all sequences, the run of keys that they look at, and which sees which.

    keys: one run for all batch rows, or one each, equally long. bias (b or 1, 1, r, t): 0 or -inf.
    """

    rows: slice
    keys: tuple[slice, ...]
    bias_b1rt: Tensor

    def take(self, x_td: Tensor) -> Tensor:
        """The run of each sequence out of keys or values (x, t, d)."""
        if len(self.keys) == 1:
            return x_td[:, self.keys[0]]
        parts = zip(x_td.chunk(len(self.keys)), self.keys, strict=True)
        return torch.cat([part[:, run] for part, run in parts])

    def add(self, total_td: Tensor, run_td: Tensor) -> None:
        """Add what belongs to the run of each sequence to the whole (x, t, d), in place."""
        count = len(self.keys)
        parts = zip(total_td.chunk(count), self.keys, run_td.chunk(count), strict=True)
        for total, run, part in parts:
            total[:, run] += part

    def mask(self, scores: Tensor, scale: float) -> None:
        """Scale products (x, r, t) of queries and keys, and hide what is not seen, in place."""
        batch = len(self.bias_b1rt)
        by_batch = scores.view(batch, len(scores) // batch, *scores.shape[1:])
        torch.add(self.bias_b1rt, by_batch, alpha=scale, out=by_batch)


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
        rows: int,
        dtype: torch.dtype = torch.float32,
    ) -> BlockTiles:
        """The tiles of blocks of ``size`` rows beside ``rows`` clean rows; see ``block_masks``.

        dtype: of the queries, if the masks are to fit them as they are.
        """
        count, starts, tiles = max(TILE_ROWS // size, 1), start_bn.tolist(), []
        for first in range(0, start_bn.shape[1], count):
            few = slice(first, min(first + count, start_bn.shape[1]))
            ends = [max(each[few]) for each in starts]
            lows = [0 if window is None else max(min(each[few]) - window, 0) for each in starts]
            width = max(end - low for end, low in zip(ends, lows, strict=True))
            width = min(_aligned(width, own=size), rows)
            keys = tuple(slice(max(end - width, 0), max(end, width)) for end in ends)
            firsts = torch.tensor([run.start for run in keys], device=start_bn.device)
            positions = firsts[:, None, None] + torch.arange(width, device=start_bn.device)
            causal = None if causal_bn is None else causal_bn[:, few]
            seen, _ = block_masks(start_bn[:, few], causal, size, positions, window)
            bias = _bias(seen.expand(-1, -1, size, -1).flatten(1, 2)[:, None], dtype)
            tiles.append(Tile(slice(few.start * size, few.stop * size), keys, bias))
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


def _window_tiles(rows: int, window: int, device: torch.device, dtype: torch.dtype) -> list[Tile]:
    tiles, biases = [], dict[tuple[int, int], Tensor]()
    for first in range(0, rows, TILE_ROWS):
        last = min(first + TILE_ROWS, rows)
        low = max(last - _aligned(last - first + window - 1), 0)
        shape = first - low, last - low  # the tiles inside have the same
        if shape not in biases:
            row = torch.arange(first, last, device=device)[:, None]
            ahead = row - torch.arange(low, last, device=device)
            biases[shape] = _bias((ahead >= 0) & (ahead < window), dtype)[None, None]
        tiles.append(Tile(slice(first, last), (slice(low, last),), biases[shape]))
    return tiles


def _aligned(width: int, own: int = 0) -> int:
    """The least width, from this on, that fills vectors together with ``own`` further keys."""
    return width + -(width + own) % _ALIGNED


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return bias.masked_fill_(~seen, float("-inf"))


def _by_head(x: Tensor) -> Tensor:
    """(b, t, h, d) to (b·h, t, d)."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _by_width(x_td: Tensor) -> Tensor:
    """(x, t, d) to (x, d, t), as a product takes it without a slow copy of its own."""
    return x_td.contiguous().transpose(1, 2)


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
            r = tile.rows
            scores = torch.bmm(q[:, r], _by_width(tile.take(k)))
            tile.mask(scores, scale)
            width = scores.shape[-1]
            if own is not None:
                scores = torch.cat((scores, own[:, r]), -1)
            weights = scores.softmax(-1)
            clean = weights[..., :width]
            out[:, r] = torch.bmm(clean, tile.take(v))
            if own_weights is not None:
                own_weights[:, r] = weights[..., width:]
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
            r = tile.rows
            grad_scores = torch.bmm(grad[:, r], _by_width(tile.take(v)))
            grad_scores.sub_(mean[:, r]).mul_(weights)
            grad_q[:, r] = torch.bmm(grad_scores, tile.take(k))
            tile.add(grad_k, torch.bmm(grad_scores.transpose(1, 2), q[:, r]))
            tile.add(grad_v, torch.bmm(weights.transpose(1, 2), grad[:, r]))
        grad_k = grad_k.mul_(scale).to(k.dtype)
        return grad_q.mul_(scale), grad_k, grad_v.to(v.dtype), grad_own, None
