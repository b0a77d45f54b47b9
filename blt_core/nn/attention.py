"""Attention kernels and rotary positions shared by all torch parts.

Axes: b batch rows, h heads, g key/value heads, r query rows, t key rows, n blocks, B rows of a
block, d width of a head. Queries come as (b, r, h, d), keys and values as (b, t, g, d).

Dispatch: plainly causal spans use SDPA's causal kernel (flash attention where the device has it); a
single new row needs no mask. Windows over whole sequences are computed in tiles on a CPU, by flex
attention when training on CUDA, otherwise in bands of the window's width. Ragged batches, several
new rows over a cached prefix, and blocks over cached rows need a mask, for which some
devices have no fused kernel. Blocks over whole sequences: see ``blt_core.nn.blocks``.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from blt_core.nn import flex, tiles
from blt_core.nn.cache import Seeing, Span


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """Rotary positions (RoPE) as unit complex numbers (…, 1, d/2), in fp32 precision."""
    rates = torch.tensor(_rates(head_dim, theta), dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * rates
    return torch.complex(angles.cos(), angles.sin())[..., None, :]


def span_angles(span: Span, head_dim: int, theta: float) -> Tensor:
    """``rotary_angles`` of a span's rows: (b or 1, r, 1, d/2)."""
    if span.size is None:
        return rotary_angles(span.positions_br, head_dim, theta)
    if span.start is not None:
        table = _angles(_table_rows(span.end), head_dim, theta, span.device)
        return table[None, span.start : span.end]
    return known_angles(span.positions_br, span.end, head_dim, theta)


def known_angles(positions: Tensor, end: int, head_dim: int, theta: float) -> Tensor:
    """``rotary_angles`` of positions below ``end``, from a table that all passes share."""
    return _angles(_table_rows(end), head_dim, theta, positions.device)[positions]


#: Angles are made for so many positions at first, then for twice as many, and so on.
_LEAST_ANGLES = 1024


def _table_rows(end: int) -> int:
    return max(_LEAST_ANGLES, 1 << (end - 1).bit_length())


@lru_cache(maxsize=64)
def _angles(rows: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """The angles of the positions below ``rows``, which every pass on the device shares."""
    # A tensor made in inference mode could not be used in training.
    with torch.inference_mode(mode=False):
        return rotary_angles(torch.arange(rows, device=device), head_dim, theta)


def real_angles(end: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """(n, 1, d/2, 2): the angles of the positions below ``end``, and more, as pairs of numbers."""
    return _real_angles(_table_rows(end), head_dim, theta, device)


@lru_cache(maxsize=64)
def _real_angles(rows: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.view_as_real(_angles(rows, head_dim, theta, device)).contiguous()


@cache
def _rates(head_dim: int, theta: float) -> list[float]:
    """How far each of d/2 pairs turns from one position to the next.

    Cached as plain floats: a cached tensor would carry the device and inference mode of its first
    use.
    """
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    rates: list[float] = (theta ** (-steps / head_dim)).tolist()
    return rates


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (x0, x1), (x2, x3), … of the last axis of (…, heads, d) by their angles."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _turn(x, angles)
    turned: Tensor = _Rotation.apply(x, angles)  # type: ignore[no-untyped-call]
    return turned


def rotate_(x: Tensor, heads: int, angles: Tensor) -> Tensor:
    """``rotate`` of the first ``heads`` of (…, h, d), in place; ``_rotated`` with real angles."""
    if not angles.is_complex():
        return _rotated(x, heads, angles)
    turning = x.narrow(-2, 0, heads)
    if x.dtype in (torch.float32, torch.float64):
        pairs = turning.view(*turning.shape[:-1], x.shape[-1] // 2, 2)
        torch.view_as_complex(pairs).mul_(angles)
    else:
        turning.copy_(_turn(turning, angles))
    return x


def _rotated(x: Tensor, heads: int, angles: Tensor) -> Tensor:
    """``rotate_`` with angles as pairs of real numbers (…, d/2, 2), and a tensor of its own.

    For compilers, which know no complex numbers.
    """
    turning, rest = x.split_with_sizes((heads, x.shape[-2] - heads), dim=-2)
    exact = torch.promote_types(x.dtype, angles.dtype)
    even, odd = turning.to(exact).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.to(exact).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return torch.cat((turned.flatten(-2).to(x.dtype), rest), -2)


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient is turned back; nothing but the angles is remembered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return _turn(x, angles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (angles,) = ctx.saved_tensors
        return _turn(grad, angles.conj()), None


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    # Pairs as complex numbers, of which there are none in half precision.
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    torch.view_as_complex(wide.view(*x.shape[:-1], x.shape[-1] // 2, 2)).mul_(angles)
    return wide.to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, span: Seeing) -> Tensor:
    """Causal, windowed attention of a span's rows over the keys it sees: (b, r, h, d).

    ``k`` and ``v`` hold what the span sees: its own rows if they are the first, or ``span.seen``.
    """
    if span.from_start:
        if span.window is not None and q.shape[1] > span.window:
            return _attend_window(q, k, v, span.window)
        return _sdpa(q, k, v, causal=q.shape[1] > 1)
    return _sdpa(q, k, v, mask=span.bias(q.dtype))


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _attend_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    if flex.is_available(q.device):
        return flex.attend_window(q, k, v, window)
    if q.device.type == "cpu":
        return tiles.attend_window(q, k, v, window)
    return _attend_banded(q, k, v, window)


def _attend_banded(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Window attention in bands: the queries of a band see their own and the previous band."""
    batch, rows = q.shape[:2]
    bands = -(-rows // window)
    pad = bands * window - rows

    def fold(x: Tensor) -> Tensor:
        padded = functional.pad(x, (0, 0, 0, 0, 0, pad))
        return padded.view(batch, bands, window, *x.shape[2:])

    def with_previous(x: Tensor) -> Tensor:
        x = fold(x)
        previous = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        return torch.cat((previous, x), dim=2).flatten(0, 1)

    query = torch.arange(window, device=q.device)[:, None]
    key = torch.arange(2 * window, device=q.device)
    # Key j of a band stands j - window rows after the band's first; the first band has no previous.
    seen = (key > query) & (key <= query + window)
    mask = seen.repeat(batch, bands, 1, 1)
    mask[:, 0, :, :window] = False
    out = _sdpa(
        fold(q).flatten(0, 1), with_previous(k), with_previous(v), mask=mask.flatten(0, 1)[:, None]
    )
    return out.reshape(batch, bands * window, *out.shape[2:])[:, :rows]


def attend_blocks(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    clean_k: Tensor,
    clean_v: Tensor,
    seen_bnBt: Tensor,
    own_bnBB: Tensor | None,
) -> Tensor:
    """Block rows (b, n, B, h, d) over the clean keys they see and their own block.

    clean_k, clean_v: (b, t, g, d), the same for all blocks.
    seen_bnBt (B may be 1): which clean keys. own_bnBB: which rows of the block (None: all).

    Scores are (n·B) × (t + B), so no square mask over clean rows and blocks is ever built (Fast
    BLT shows the mask that this equals).
    """
    if not q.shape[1]:
        return q  # no block: nothing to attend
    own_bnBB = seen_bnBt.new_ones(1) if own_bnBB is None else own_bnBB
    seen_bnBt = seen_bnBt.expand(*q.shape[:3], -1)
    own_bnBB = own_bnBB.expand(*q.shape[:3], own_k.shape[2])
    if q.shape[1] > 1:
        return _attend_shared(q, own_k, own_v, clean_k, clean_v, seen_bnBt, own_bnBB)
    keys, values = joined(clean_k, own_k[:, 0]), joined(clean_v, own_v[:, 0])
    mask = torch.cat((seen_bnBt, own_bnBB), -1)
    return _sdpa(q[:, 0], keys, values, mask=mask)[:, None]


def joined(clean: Tensor, own: Tensor) -> Tensor:
    """(b, t + B, g, d) of both, the rows of a head side by side, as attention reads them best."""
    return torch.cat((clean.transpose(1, 2), own.transpose(1, 2)), 2).transpose(1, 2)


def _attend_shared(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    clean_k: Tensor,
    clean_v: Tensor,
    seen_bnBt: Tensor,
    own_bnBB: Tensor,
) -> Tensor:
    """Blocks over clean keys that all share: one softmax over two groups of scores.

    The keys are not copied for each block, as they would be side by side in one tensor.
    """
    groups = q.shape[3] // own_k.shape[3]
    q = q.unflatten(3, (own_k.shape[3], groups)) * q.shape[-1] ** -0.5  # (b, n, B, g, heads/g, d)
    clean = torch.einsum("bnigcd,btgd->bngcit", q, clean_k)
    clean = clean.masked_fill(~seen_bnBt[:, :, None, None], float("-inf"))
    own = torch.einsum("bnigcd,bnjgd->bngcij", q, own_k)
    own = own.masked_fill(~own_bnBB[:, :, None, None], float("-inf"))
    weights = torch.cat((clean, own), dim=-1).softmax(-1)
    clean, own = weights.split((clean.shape[-1], own.shape[-1]), dim=-1)
    out = torch.einsum("bngcit,btgd->bnigcd", clean, clean_v)
    out = out + torch.einsum("bngcij,bnjgd->bnigcd", own, own_v)
    return out.flatten(3, 4)
