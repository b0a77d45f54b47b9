"""How decoder rows read latents: cross-attention of each row to the k slots of one latent.

Axes: b batch rows, m patches, n groups of rows that read one latent, i rows of a group, k slots,
h heads, d width of a head, D width of the decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blt_core.nn import Linear, RMSNorm, RowCache, check_heads, take_rows
from blt_core.types import Latents


class LatentAttention(nn.Module):
    """Queries from byte rows, keys and values from latent slots (BLT, section 3.3)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        check_heads(dim, heads, heads)
        self.heads = heads
        self.row_norm = RMSNorm(dim)
        self.slot_norm = RMSNorm(dim)
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, dim, dim)
        self.out = Linear(dim, dim)

    def keys_values(self, slots_bmkD: Tensor) -> Tensor:
        """(b, m, k, 2h, d): what is remembered of latents; the first h heads are keys."""
        return self.kv(self.slot_norm(slots_bmkD)).unflatten(-1, (2 * self.heads, -1))

    def forward(self, x: Tensor, memory: Tensor, latent_bn: Tensor) -> Tensor:
        """(b, n, i, D) to (b, n, i, D); the i rows of a group read one latent, ``latent_bn``."""
        q = self.q(self.row_norm(x)).view(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        k, v = take_rows(memory, latent_bn).chunk(2, dim=-2)  # (b, n, k, h, d)
        exact = torch.finfo(x.dtype).bits >= torch.finfo(torch.float32).bits
        attend = _attend_one if x.shape[2] == 1 and exact else _attend_group
        return self.out(attend(q * q.shape[-1] ** -0.5, k, v).flatten(-2))


def _attend_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Groups of one row, (b, n, 1, h, d): a few slots are met faster by plain products.

    Slot by slot, for a sum over an axis of a few slots is slow, and so is its gradient. Each
    product is rounded, so it is not for half precision.
    """
    scores = torch.stack([(q * key).sum(-1) for key in k.split(1, 2)])  # (k, b, n, 1, h)
    weights = scores.softmax(0)[..., None]
    read: Tensor = sum(weight * value for weight, value in zip(weights, v.split(1, 2), strict=True))
    return read


def _attend_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Groups of any size: q (b, n, i, h, d) over k and v (b, n, k, h, d)."""
    q, k, v = (x.transpose(2, 3) for x in (q, k, v))
    return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(2, 3)


class LatentMemory:
    """Keys and values of all latents that rows may read: those in the cache, and new ones.

    slots_bmkD: the slots of the new latents, or None where there are none.
    """

    def __init__(
        self,
        slots_bmkD: Tensor | None,
        latents: Latents | None,
        cache: RowCache | None,
    ) -> None:
        self._slots, self._cache = slots_bmkD, cache
        self._span = (
            cache.extend(latents.counts, latents.values_bmD.shape[1], latents.values_bmD.device)
            if cache is not None and latents is not None
            else None
        )

    def of(self, attention: LatentAttention, lane: str) -> Tensor:
        """(b, t, k, 2h, d) for one layer; new latents are remembered."""
        new = attention.keys_values(self._slots) if self._slots is not None else None
        if self._cache is None:
            if new is None:
                raise ValueError("a decoder without a cache needs latents")
            return new
        if new is not None and self._span is not None:
            self._cache.write(lane, self._span, new)
        return self._cache.read(lane, 0, None)
