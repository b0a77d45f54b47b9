"""Whole sequences with dense boolean masks: the plain formulation, for comparison.

What a decoder's rows see is one mask over [clean rows; block rows], (N + n·B)² for n blocks of B
bytes; other windows are masks over all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from blt_core.nn import layers, rotary_angles
from blt_core.nn.cache import Span
from blt_core.types import Blocks, DecoderOutput, Latents, Rows
from blt_plugins.local.decoder import LocalDecoder, LocalDecoderCache
from blt_plugins.local.latents import LatentMemory


@contextmanager
def dense_masks() -> Iterator[None]:
    """Within it all attention of whole sequences goes through dense boolean masks."""
    with (
        mock.patch.object(LocalDecoder, "forward", DenseDecoder.forward),
        mock.patch.object(layers, "attend", attend_densely),
    ):
        yield


def attend_densely(q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
    """``attend`` of whole sequences: (b, r, h, d) over (b, r, g, d)."""
    if not span.from_start:
        raise ValueError("dense masks are for whole sequences")
    return masked_attention(q, k, v, window_mask(q.shape[1], span.window, q.device))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention (b, r, h, d) under a mask (r, t) or (b, 1, r, t)."""
    out = functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        attn_mask=mask,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


@cache
def window_mask(rows: int, window: int | None, device: torch.device) -> Tensor:
    """(rows, rows): a row sees itself and those before it, within the window."""
    row = torch.arange(rows, device=device)
    ahead = row[:, None] - row
    return (ahead >= 0) & (ahead < (window or rows))


class DenseDecoder(LocalDecoder):
    """The same decoder, whose clean and block rows are one sequence under one mask.

    Axes: b batch rows, r clean rows, n blocks, B rows of a block, l all rows: r + n·B.
    """

    def forward(
        self,
        clean: Rows | None,
        blocks: Blocks | None,
        latents: Latents | None,
        cache: LocalDecoderCache | None,
    ) -> DecoderOutput:
        """As ``LocalDecoder.forward``, for whole sequences."""
        if clean is None or cache is not None or self.embed is None:
            raise ValueError("dense masks are for clean rows of whole sequences")
        slots = None if latents is None else self._slots_of(latents)
        memory = LatentMemory(latents, None)
        batch, rows = clean.ids_br.shape
        x, y = self.embed(clean.ids_br), None
        positions = torch.arange(rows, device=x.device).expand(batch, rows)
        mask = window_mask(rows, self.window, x.device)
        if blocks is not None:
            y = self.embed(blocks.ids_bnB)
            own = blocks.start_bn[..., None] + torch.arange(y.shape[2], device=x.device)
            positions = torch.cat((positions, own.flatten(1)), 1)
            mask = dense_mask(blocks, rows, self.window)
        angles = rotary_angles(positions, self.head_dim, self.rope_theta)
        for index, layer in enumerate(self.layers):
            latent_kv = memory.of(layer.latent_attention, slots, f"layer{index}")
            x = x + layer.latent_attention(x[:, :, None], latent_kv, clean.latent_br)[:, :, 0]
            z = x
            if blocks is not None and y is not None:
                y = y + layer.latent_attention(y, latent_kv, blocks.latent_bn)
                z = torch.cat((x, y.flatten(1, 2)), 1)
            q, k, v = layer.attention.project(layer.attention_norm(z), angles)
            z = z + layer.attention.out(masked_attention(q, k, v, mask).flatten(-2))
            z = z + layer.mlp(layer.mlp_norm(z))
            x = z[:, :rows]
            y = None if y is None else z[:, rows:].view(y.shape)
        return DecoderOutput(self._output(x), self._output(y))


def dense_mask(blocks: Blocks, rows: int, window: int | None) -> Tensor:
    """(b, 1, l, l): what rows of [clean; blocks] see of each other (Fast BLT).

    A clean row sees clean rows. Rows of a masked block see what the clean row before the block
    sees, and all of their block. A row of a causal block sees what a clean row at its place would,
    with the rows of its own block in place of the clean ones.
    """
    batch, count, size = blocks.ids_bnB.shape
    causal_bn, device = blocks.causal_bn, blocks.start_bn.device
    if causal_bn is None:
        causal_bn = torch.zeros(batch, count, dtype=torch.bool, device=device)
    reach = window or rows + size
    place, key, number = (torch.arange(n, device=device) for n in (size, rows, count))
    start_bl = blocks.start_bn.repeat_interleave(size, 1)
    causal_bl = causal_bn.repeat_interleave(size, 1)
    place_l, number_l = place.repeat(count), number.repeat_interleave(size)
    at_bl = start_bl + torch.where(causal_bl, place_l, -1)
    clean = (key < start_bl[..., None]) & (at_bl[..., None] - key < reach)
    ahead = place_l[:, None] - place_l
    own = ~causal_bl[..., None] | ((ahead >= 0) & (ahead < reach))
    own = own & (number_l[:, None] == number_l)
    total = rows + count * size
    mask = torch.zeros(batch, 1, total, total, dtype=torch.bool, device=device)
    mask[:, 0, :rows, :rows] = window_mask(rows, window, device)
    mask[:, 0, rows:, :rows], mask[:, 0, rows:, rows:] = clean, own
    return mask
