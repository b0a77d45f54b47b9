"""How decoder rows read latents: cross-attention of each row to the k slots of one latent.

Axes: b batch rows, m patches, n groups of rows that read one latent, i rows of a group, k slots,
h heads, d width of a head, D width of the decoder.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor, nn

from blt_core.nn import (
    Linear,
    RMSNorm,
    RowCache,
    check_heads,
    new_span,
    norm,
    product,
    row_places,
)
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

    def forward(self, x: Tensor, memory: Tensor, places_bn: Tensor) -> Tensor:
        """(b, n, i, D) to (b, n, i, D); the i rows of a group read one latent.

        memory (t, k, 2h, d): what is remembered of latents, that of each group at ``places_bn``.
        """
        q = self.q(self.row_norm(x)).unflatten(-1, (self.heads, -1))
        read = memory.index_select(0, places_bn.flatten())  # (b·n, k, 2h, d)
        if not torch.is_grad_enabled():
            return self.out(attend_slots(q.flatten(0, 1), read).reshape(x.shape))
        k, v = read.view(*places_bn.shape, *read.shape[1:]).chunk(2, dim=-2)
        attend = _attend_one if x.shape[2] == 1 and x.dtype in _EXACT else _attend_group
        return self.out(attend(q * q.shape[-1] ** -0.5, k, v).flatten(-2))


_EXACT = (torch.float32, torch.float64)


@attrs.frozen(eq=False)
class BareLatentAttention:
    """A norm and the attention of byte rows to latents; see ``blt_core.nn.bare``."""

    norm: Tensor
    q: Tensor
    out: Tensor
    heads: int

    @classmethod
    def of(cls, attention: LatentAttention) -> BareLatentAttention:
        """The weights of an attention."""
        weights = (part.weight for part in (attention.row_norm, attention.q, attention.out))
        return cls(*weights, attention.heads)

    def __call__(self, x: Tensor, memory: Tensor, places: Tensor) -> Tensor:
        """What rows (b, r, D) read, (b, r, D); ``places`` (b · r): where in the memory."""
        # Not len(places): a compiler would take that for a constant.
        q = product(norm(x, self.norm), self.q).view(places.shape[0], 1, self.heads, -1)
        return product(attend_slots(q, memory.index_select(0, places)).reshape(x.shape), self.out)


def attend_slots(q: Tensor, read: Tensor) -> Tensor:
    """Groups of rows (n, i, h, d) over what each has read, (n, k, 2h, d): (n, i, h, d)."""
    k, v = read.chunk(2, dim=2)
    q = q * q.shape[-1] ** -0.5
    attend = _products if q.shape[1] == 1 and q.dtype in _EXACT else _attend_group
    return attend(q, k, v)


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Groups of one row, (n, 1, h, d), over (n, k, h, d): fast for a few groups, and exact."""
    weights = (q * k).sum(-1, keepdim=True).softmax(1)
    return (weights * v).sum(1)


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
    """Groups of any size: q (…, n, i, h, d) over k and v (…, n, k, h, d)."""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(-3, -2)


class LatentMemory:
    """Keys and values of all latents that rows may read: those in the cache, and new ones.

    latents: the new ones, or None where there are none.
    """

    def __init__(self, latents: Latents | None, cache: RowCache | None) -> None:
        self._new = 0 if latents is None else latents.values_bmD.shape[1]
        self._cache = cache
        self._span = (
            new_span(latents.values_bmD, latents.counts, cache, None, *_known(latents))
            if cache is not None and latents is not None
            else None
        )

        # The first ones are read as they are: of a long prompt the cache keeps the last alone.
        self._reads_new = cache is None or (self._span is not None and self._span.from_start)

    def places(self, latent_bn: Tensor) -> Tensor:
        """Where latents are in what ``of`` gives; for new ones too."""
        if self._cache is None or self._reads_new:
            return row_places(latent_bn, self._new)
        return self._cache.places(latent_bn)

    def of(self, attention: LatentAttention, slots_bmkD: Tensor | None, lane: str) -> Tensor:
        """(t, k, 2h, d) of all batch rows for one layer.

        slots_bmkD: of the new latents, which are remembered; None where there are none.
        """
        new = attention.keys_values(slots_bmkD) if slots_bmkD is not None else None
        if self._cache is None:
            if new is None:
                raise ValueError("a decoder without a cache needs latents")
            return new.flatten(0, 1)
        if new is not None and self._span is not None:
            self._cache.write(lane, self._span, new)
            if self._reads_new:
                return new.flatten(0, 1)
        return self._cache.rows(lane)


def _known(latents: Latents) -> tuple[Tensor | None, tuple[int, ...] | None]:
    return latents.extents_2b, latents.settled
