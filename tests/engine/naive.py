"""The local decoder and windowed attention written out plainly, sharing no code with the product.

One concatenated sequence [clean; blocks], an explicit square mask, one softmax, row by row
cross-attention. Axes: t rows of the sequence, D width, h heads, d width of a head, k slots, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from blt_plugins.local.decoder import DecoderLayer, LocalDecoder


def square_mask(clean: int, starts: Sequence[int], size: int, window: int | None) -> Tensor:
    """(t, t) bool of [clean; blocks], entry by entry: may row q see row s?"""
    reach = window if window is not None else clean + size
    kinds = [(-1, i) for i in range(clean)]
    kinds += [(n, start + j) for n, start in enumerate(starts) for j in range(size)]

    def sees(q: tuple[int, int], s: tuple[int, int]) -> bool:
        (q_block, q_at), (s_block, s_at) = q, s
        if q_block < 0:
            return s_block < 0 and s_at <= q_at and q_at - s_at < reach
        if s_block < 0:
            return starts[q_block] - reach <= s_at < starts[q_block]
        return q_block == s_block

    return torch.tensor([[sees(q, s) for s in kinds] for q in kinds])


def decode(
    decoder: LocalDecoder,
    inputs_tD: Tensor,
    positions: Sequence[int],
    reads: Sequence[int],
    latents_mD: Tensor,
    mask_tt: Tensor,
) -> Tensor:
    """(t, V): logits of all rows of the concatenated sequence."""
    x = inputs_tD
    slots = (latents_mD @ decoder.from_latent.weight.T).unflatten(-1, (decoder.slots, -1))
    for layer in decoder.layers:
        kept = 2 * x if layer.double_residual else x
        x = kept + torch.stack(
            [_read(layer, row, slots[at]) for row, at in zip(x, reads, strict=True)]
        )
        x = x + _attention(layer, x, positions, mask_tt, decoder.rope_theta)
        x = x + _mlp(layer, x)
    return _rms(x, decoder.norm.weight) @ decoder.head.weight.T


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(t, d) of one head by plain softmax; every query sees at least one key."""
    scores = (q @ k.T / sqrt(q.shape[-1])).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def _read(layer: DecoderLayer, row_D: Tensor, slots_kD: Tensor) -> Tensor:
    """One row's cross-attention to the slots of one latent."""
    part = layer.latent_attention
    width = len(row_D) // part.heads
    q = _rms(row_D, part.row_norm.weight) @ part.q.weight.T
    keys, values = (_rms(slots_kD, part.slot_norm.weight) @ part.kv.weight.T).chunk(2, -1)
    out = []
    for h in range(part.heads):
        cut = slice(h * width, (h + 1) * width)
        weights = (keys[:, cut] @ q[cut] / sqrt(width)).softmax(0)
        out.append(weights @ values[:, cut])
    return part.out.weight @ torch.cat(out)


def _attention(
    layer: DecoderLayer, x: Tensor, positions: Sequence[int], mask: Tensor, theta: float
) -> Tensor:
    part = layer.attention
    width = x.shape[-1] // part.heads
    q, k, v = (_rms(x, layer.attention_norm.weight) @ part.qkv.weight.T).chunk(3, -1)
    out = []
    for h in range(part.heads):
        cut = slice(h * width, (h + 1) * width)
        turned = [_rope(y[:, cut], positions, theta) for y in (q, k)]
        out.append(attention(*turned, v[:, cut], mask))
    return torch.cat(out, -1) @ part.out.weight.T


def _rope(x_td: Tensor, positions: Sequence[int], theta: float) -> Tensor:
    """Pairs as complex numbers, turned by position · theta^(-2i/d); angles are fp32 by contract."""
    width = x_td.shape[-1]
    rates = theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.tensor(positions, dtype=torch.float32)[:, None] * rates
    turn = torch.complex(angles.cos().double(), angles.sin().double())
    pairs = torch.complex(x_td[:, 0::2].contiguous(), x_td[:, 1::2].contiguous())
    return torch.view_as_real(pairs * turn).flatten(1)


def _mlp(layer: DecoderLayer, x: Tensor) -> Tensor:
    gate, up = (_rms(x, layer.mlp_norm.weight) @ layer.mlp.gate_up.weight.T).chunk(2, -1)
    return (gate * gate.sigmoid() * up) @ layer.mlp.down.weight.T
