"""Transformer layers of the torch parts: RMSNorm, SwiGLU, grouped-query attention, a plain stack.

Axes: b batch rows, r rows, D width of the model. Pre-norm, no biases (BLT, section 4.8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from blt_core.nn.attention import attend, rotate, span_angles
from blt_core.nn.bare import (
    NORM_EPS,
    BareLayer,
    EndWeights,
    attend_cached,
    bare_layers,
    is_plain,
    norm,
    norm_scale,
    runs_bare,
)
from blt_core.nn.cache import LayerCache, RowCache, Span, lane_of
from blt_core.nn.compiled import CompiledPass, Compiler, StackWeights, StaticRows, stack_weights
from blt_core.nn.linear import Linear, product, product_dtype
from blt_core.nn.packing import Packing
from blt_core.nn.recompute import recompute


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) · weight, over the last axis."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        # On a CPU torch strings nine kernels together, and more for the gradient.
        if x.is_cpu and (x.numel() != x.shape[-1] or torch.is_grad_enabled()):
            # Rows are normed to be multiplied, so they are narrowed to what products take.
            dtype = product_dtype(x)
            normed: Tensor = _Norm.apply(x, self.weight, dtype)  # type: ignore[no-untyped-call]
            return normed
        return norm(x, self.weight)  # under autocast rows may be narrower than weights


class _Norm(torch.autograd.Function):
    """The norm with few passes over its rows: it remembers them and one number for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = norm_scale(wide)
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = (wide * scale).mul_(weight).to(dtype)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        wide, grad, wide_weight = x.to(scale.dtype), grad.to(scale.dtype), weight.to(scale.dtype)
        # y = s·w·x, s = (mean(x²) + eps)^-½: dx = s·w·dy - x·s³·(x · w·dy)/D and dw = Σ s·x·dy.
        products = grad * wide
        along = (products @ wide_weight)[..., None].mul_(scale**3).div_(x.shape[-1])
        grad_weight = scale.flatten() @ products.flatten(0, -2)
        grad_x = (grad * wide_weight).mul_(scale).addcmul_(wide, along, value=-1)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)); gate and up are one matrix, in this order.

    ``splits_weight``: whether gate and up may be read as two halves of that matrix, which is faster
    in training on a CPU; see :func:`read_weights_whole`.
    """

    splits_weight = True

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, hidden, hidden)
        self.down = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        if self.splits_weight and torch.is_grad_enabled() and x.device.type == "cpu":
            # Two products leave two whole tensors: fewer strides, forward and backward.
            gate, up = (functional.linear(x, each) for each in self.gate_up.weight.chunk(2))
        else:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(functional.silu(gate) * up)
        return out


def read_weights_whole(module: nn.Module) -> None:
    """Have every layer of ``module`` read a weight whole, in the call of the module that owns it.

    For training that lends weights for the time of such a call (ZeRO 3): a view of a part of one
    would keep it until the backward pass.
    """
    for part in module.modules():
        if isinstance(part, SwiGLU):
            part.splits_weight = False


class SelfAttention(nn.Module):
    """Causal attention with rotary positions; q, k and v are one matrix, in this order."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        own, shared = heads * self.head_dim, kv_heads * self.head_dim
        self.qkv = Linear(dim, own, shared, shared)
        self.out = Linear(dim, dim)

    def project(
        self, x: Tensor, angles: Tensor, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (…, h, d) and keys, and values (…, g, d), of rows (…, D).

        Rows that are packed leave as (b, r, …).
        """
        qkv = self._qkv(x, packing)
        qk, v = qkv.split_with_sizes((self.heads + self.kv_heads, self.kv_heads), dim=-2)
        q, k = rotate(qk, angles).split_with_sizes((self.heads, self.kv_heads), dim=-2)
        return q, k, v

    def _qkv(self, x: Tensor, packing: Packing | None) -> Tensor:
        """(…, h + 2g, d)."""
        qkv = self.qkv(x).view(*x.shape[:-1], self.heads + 2 * self.kv_heads, self.head_dim)
        return qkv if packing is None else packing.unpack(qkv)

    def forward(
        self,
        x: Tensor,
        angles: Tensor,
        span: Span,
        cache: RowCache | None,
        lane: str,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(output, keys, values): (b, r, D), or packed, and the new rows' own keys and values.

        With a cache, which remembers them, keys and values are None.
        """
        if cache is None:
            q, k, v = self.project(x, angles, span.packing)
            attended = attend(q, k, v, span).flatten(-2)
            attended = attended if span.packing is None else span.packing.pack(attended)
            return self.out(attended), k, v
        qkv, sizes = self._qkv(x, None), (self.heads, self.kv_heads)
        return self.out(attend_cached(qkv, *sizes, angles, span, cache, lane)), None, None


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim)
        self.attention = SelfAttention(dim, heads, kv_heads)
        self.mlp_norm = RMSNorm(dim)
        self.mlp = SwiGLU(dim, hidden)

    def forward(
        self,
        x: Tensor,
        angles: Tensor,
        span: Span,
        cache: RowCache | None,
        lane: str,
    ) -> Tensor:
        """(b, r, D) to (b, r, D); rows may be packed."""
        x = x + self.attention(self.attention_norm(x), angles, span, cache, lane)[0]
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


#: What a layer consists of that may run without its modules.
BARE_KINDS = frozenset({Linear, RMSNorm, SelfAttention, SwiGLU, TransformerLayer})


def end_weights(embed: nn.Embedding | None, norm: RMSNorm, head: Linear) -> EndWeights | None:
    """What stands around layers, for passes that run without modules; None: these must be called.

    embed: ids to rows (None: rows are given as they are); norm, head: rows to logits.
    """
    kinds = {nn.Embedding, RMSNorm, Linear}
    ends = [each for each in (embed, norm, head) if each is not None]
    if not all(is_plain(each, kinds) for each in ends):
        return None
    return EndWeights(None if embed is None else embed.weight, norm.weight, head.weight)


class Transformer(nn.Module):
    """A causal stack with rotary positions and an optional window; it owns no embedding or head.

    ``compiles``: what compiles its passes over a cache (None: nothing does).
    """

    def __init__(
        self,
        *,
        dim: int,
        layers: int,
        heads: int,
        kv_heads: int | None = None,
        hidden: int,
        window: int | None = None,
        rope_theta: float,
    ) -> None:
        super().__init__()
        check_heads(dim, heads, kv_heads or heads)
        self.window, self.rope_theta, self.head_dim = window, rope_theta, dim // heads
        self.compiles: Compiler | None = None
        self._compiled = CompiledPass("layers", run_layers)
        self.layers = nn.ModuleList(
            TransformerLayer(dim, heads, kv_heads or heads, hidden) for _ in range(layers)
        )

    def new_cache(self, batch: int, keep: int = 0, ends: EndWeights | None = None) -> RowCache:
        """An empty cache for ``batch`` rows, which keeps at least ``keep`` settled rows.

        ends: what ``predict`` puts around the layers, for passes that are compiled with it.
        """
        layers = bare_layers(self.layers, BareLayer.of, BARE_KINDS)
        return LayerCache(layers, batch, self.window, keep, ends)

    def forward(
        self,
        x: Tensor,
        counts: tuple[int, ...],
        cache: RowCache | None,
        extents_2b: Tensor | None = None,
        settled: tuple[int, ...] | None = None,
    ) -> Tensor:
        """New rows (b, r, D), ``counts[b]`` of them valid, to their states (b, r, D).

        extents_2b, settled: see :class:`blt_core.types.Rows`.
        """
        span = new_span(x, counts, cache, self.window, extents_2b, settled)
        return self.run(x, span, cache)

    def predict(
        self,
        ids_br: Tensor,
        counts: tuple[int, ...],
        cache: RowCache | None,
        ends: tuple[nn.Embedding, RMSNorm, Linear],
        extents_2b: Tensor | None = None,
        settled: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Logits (b, r, V) of new ids, with modules before the stack and after it."""
        span = new_span(ids_br, counts, cache, self.window, extents_2b, settled)
        if isinstance(cache, LayerCache) and cache.ends is not None:
            logits = self._run_compiled(ids_br, span, cache, cache.ends)
            if logits is not None:
                return logits
        embed, norm, head = ends
        out: Tensor = head(norm(self.run(embed(ids_br), span, cache)))
        return out

    def run(self, x: Tensor, span: Span, cache: RowCache | None) -> Tensor:
        """As ``forward``, for rows whose span is known."""
        if (
            isinstance(cache, LayerCache)
            and (done := self._run_compiled(x, span, cache)) is not None
        ):
            return done
        angles = span_angles(span, self.head_dim, self.rope_theta)
        span = span.packed()
        if (packing := span.packing) is not None:
            x = packing.pack(x)
        if isinstance(cache, LayerCache) and cache.layers and runs_bare(x):
            for index, bare in enumerate(cache.layers):
                x = bare(x, angles, span, cache, lane_of(index))
        else:
            for index, layer in enumerate(self.layers):
                x = recompute(layer, x, angles, span, cache, lane_of(index))
        return x if packing is None else packing.unpack(x)

    def _run_compiled(
        self,
        x: Tensor,
        span: Span,
        cache: LayerCache[BareLayer],
        ends: EndWeights | None = None,
    ) -> Tensor | None:
        """Rows (b, r, D) through the layers, or ids with ``ends``; None: this is not compiled."""
        layers = cache.layers
        if self.compiles is None or not layers or not runs_bare(x):
            return None
        rows = StaticRows.of(span, cache, len(layers), self.head_dim, self.rope_theta)
        if rows is None:
            return None
        weights = cache.kept(("weights", ends is None), lambda: stack_weights(layers, ends))
        for piece, each in weights:
            (x,) = self._compiled(self.compiles, rows.of_layers(piece), (x,), each)
        return x


def run_layers(
    rows: StaticRows,
    inputs: Sequence[Tensor],
    _: Sequence[Tensor],
    weights: StackWeights[BareLayer],
) -> tuple[Tensor, ...]:
    """Rows (b, r, D) through layers over a cache: what is compiled.

    ``inputs``: these rows, or their ids.
    """
    x = inputs[0] if weights.embed is None else functional.embedding(inputs[0], weights.embed)
    angles, (span, cache) = rows.angles, rows.open(x.dtype)
    for index, bare in enumerate(weights.layers):
        x = bare(x, angles, span, cache, lane_of(index))
    if weights.norm is None or weights.head is None:
        return (x,)
    return (product(norm(x, weights.norm), weights.head),)


def new_span(
    x: Tensor,
    counts: tuple[int, ...],
    cache: RowCache | None,
    window: int | None,
    extents_2b: Tensor | None = None,
    settled: tuple[int, ...] | None = None,
) -> Span:
    """The span of new rows ``x`` (b, r, …), continuing ``cache`` or, without one, from row 0.

    extents_2b, settled: see :class:`blt_core.types.Rows`.
    """
    if cache is None:
        return Span.whole(counts, x.shape[1], window, x.device)
    return cache.extend(counts, x.shape[1], x.device, extents_2b, settled)


def check_heads(dim: int, heads: int, kv_heads: int) -> None:
    """Raise ValueError unless heads divide the width evenly, into pairs that can be rotated."""
    if dim % heads or (dim // heads) % 2:
        raise ValueError(f"heads: {heads} heads do not divide dim {dim} into even widths")
    if heads % kv_heads:
        raise ValueError(f"kv_heads: {kv_heads} does not divide heads {heads}")


def initialise(module: nn.Module, layers: int) -> None:
    """Normal(0, 0.02) weights; outputs of residual branches scaled by 1/sqrt(2 · layers)."""
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:  # noqa: PLR2004 -- norms keep their ones
            continue
        residual = name.endswith(("out.weight", "down.weight"))
        std = 0.02 / (2 * max(layers, 1)) ** 0.5 if residual else 0.02
        with torch.no_grad():
            parameter.normal_(0.0, std)
