"""Layers as plain functions of their weights: what decoding runs, a few rows at a time.

A pass over one byte multiplies a few small matrices; calling modules, whose attributes are looked
up and hooks asked for, takes as long again. So a cache keeps the weights of the layers that it
serves for the time of one generation, unless modules do more than their classes say: have hooks, as
under sharded training, or were wrapped or replaced. Then modules are called, and under autocast or
with gradients too. Both ways compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, TypeVar

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from blt_core.nn.attention import attend, rotate_
from blt_core.nn.cache import Lanes, SpanT
from blt_core.nn.linear import product

if TYPE_CHECKING:
    from blt_core.nn.layers import RMSNorm, SelfAttention, SwiGLU, TransformerLayer

NORM_EPS = 1e-5
_EXACT = (torch.float32, torch.float64)

B = TypeVar("B")


def bare_layers(
    layers: nn.ModuleList, make: Callable[..., B], kinds: Collection[type[nn.Module]]
) -> list[B] | None:
    """``make(layer)`` of each layer; None if a module among them must be called.

    That is one which is not exactly of one of these ``kinds``, or has hooks or a ``forward`` of its
    own.
    """
    plain = is_plain(layers, {nn.ModuleList, *kinds})
    return [make(layer) for layer in layers] if plain else None


def is_plain(module: nn.Module, kinds: Collection[type[nn.Module]]) -> bool:
    """Whether a module and those in it do what their classes say, which are all of ``kinds``.

    Others are of another class, or have hooks or a ``forward`` of their own: they must be called.
    """
    return not _has_any_global_hook() and all(
        type(each) in kinds
        and not (each._forward_hooks or each._forward_pre_hooks)  # noqa: SLF001
        and "forward" not in vars(each)
        for each in module.modules()
    )


@attrs.frozen(eq=False)
class EndWeights:
    """An embedding of ids before layers (None: rows come as they are), a norm and a head after."""

    embed: Tensor | None
    norm: Tensor
    head: Tensor


def runs_bare(x: Tensor) -> bool:
    """Whether rows may pass by modules now: no gradients, no autocast."""
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """The norm x / sqrt(mean(x²) + eps) · weight, over the last axis of (…, D)."""
    width = x.shape[-1]
    if torch.compiler.is_compiling():
        return _norm_traced(x, weight)
    if not x.is_cpu:
        same = x if x.dtype == weight.dtype else x.to(weight.dtype)
        out: Tensor = functional.rms_norm(same, (width,), weight, NORM_EPS)
        return out
    wide = x if x.dtype in _EXACT else x.float()
    if x.numel() == width:
        length = float(torch.linalg.vector_norm(wide))
        scale = (length * length / width + NORM_EPS) ** -0.5
        normed: Tensor = (wide * scale).mul_(weight)
    else:
        normed = (wide * norm_scale(wide)).mul_(weight)
    return normed if wide is x else normed.to(x.dtype)


def _norm_traced(x: Tensor, weight: Tensor) -> Tensor:
    """``norm`` as a compiler can join it with what is around it: without a look at a number."""
    wide = x if x.dtype in _EXACT else x.float()
    scale = (wide.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    return (wide * scale * weight).to(x.dtype)


def norm_scale(wide: Tensor) -> Tensor:
    """(…, 1): what rows (…, D) are multiplied with to have a mean square of 1."""
    scale: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    return scale.div_(wide.shape[-1]).add_(NORM_EPS).rsqrt_()


@attrs.frozen(eq=False)
class BareMLP:
    """Norm and SwiGLU; see the modules of these names."""

    norm: Tensor
    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, before: RMSNorm, mlp: SwiGLU) -> BareMLP:
        """The weights of a norm and of the mlp behind it."""
        return cls(before.weight, mlp.gate_up.weight, mlp.down.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """(…, D) to x + mlp(norm(x))."""
        gate, up = product(norm(x, self.norm), self.gate_up).chunk(2, dim=-1)
        return product(functional.silu(gate).mul_(up), self.down).add_(x)


@attrs.frozen(eq=False)
class BareAttention:
    """Norm and causal attention over a cache."""

    norm: Tensor
    qkv: Tensor
    out: Tensor
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, before: RMSNorm, attention: SelfAttention) -> BareAttention:
        """The weights of a norm and of the attention behind it."""
        sizes = attention.heads, attention.kv_heads, attention.head_dim
        return cls(before.weight, attention.qkv.weight, attention.out.weight, *sizes)

    def __call__(
        self, x: Tensor, angles: Tensor, span: SpanT, cache: Lanes[SpanT], lane: str
    ) -> Tensor:
        """(b, r, D), or packed, to x + attention(norm(x))."""
        heads, shared = self.heads, self.kv_heads
        qkv = product(norm(x, self.norm), self.qkv)
        qkv = qkv.view(*x.shape[:-1], heads + 2 * shared, self.head_dim)
        read = attend_cached(qkv, heads, shared, angles, span, cache, lane)
        return product(read, self.out).add_(x)


def attend_cached(
    qkv: Tensor,
    heads: int,
    shared: int,
    angles: Tensor,
    span: SpanT,
    cache: Lanes[SpanT],
    lane: str,
) -> Tensor:
    """What heads of new rows read, (…, h · d), of queries, keys and values (…, h + 2g, d).

    Keys and values are rotated in place, and remembered.
    """
    qkv = qkv if span.packing is None else span.packing.unpack(qkv)
    q, kv = rotate_(qkv, heads + shared, angles).split_with_sizes((heads, 2 * shared), dim=-2)
    cache.write(lane, span, kv, heads=True)
    k, v = (kv if span.from_start else cache.read(lane, span)).chunk(2, dim=-2)
    attended = attend(q, k, v, span).flatten(-2)
    return attended if span.packing is None else span.packing.pack(attended)


@attrs.frozen(eq=False)
class BareLayer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    attention: BareAttention
    mlp: BareMLP

    @classmethod
    def of(cls, layer: TransformerLayer) -> BareLayer:
        """The weights of a layer."""
        attention = BareAttention.of(layer.attention_norm, layer.attention)
        return cls(attention, BareMLP.of(layer.mlp_norm, layer.mlp))

    def __call__(
        self, x: Tensor, angles: Tensor, span: SpanT, cache: Lanes[SpanT], lane: str
    ) -> Tensor:
        """(b, r, D) to (b, r, D); rows may be packed."""
        return self.mlp(self.attention(x, angles, span, cache, lane))
