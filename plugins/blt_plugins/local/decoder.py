"""The local decoder: byte rows that read latents, to logits (BLT, section 3.3).

It runs clean rows (next byte) and corrupted blocks (own byte; Fast BLT) by the same
weights. Axes: b batch rows, r clean rows, m patches, n blocks, B rows of a block, k latent slots,
h heads, d width of a head, D width of the decoder, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

from blt_core.component import BuildContext, Component, at_least, more_than, overridable, trained
from blt_core.nn import (
    BARE_KINDS,
    BareAttention,
    BareMLP,
    BlockMasks,
    BlockSight,
    CompiledPass,
    Compiler,
    Lanes,
    LayerCache,
    Linear,
    Packing,
    RMSNorm,
    RowCache,
    SelfAttention,
    Span,
    SpanT,
    StackWeights,
    StaticRows,
    Subset,
    SwiGLU,
    bare_layers,
    block_masks,
    check_heads,
    end_weights,
    initialise,
    known_angles,
    lane_of,
    new_span,
    norm,
    product,
    product_dtype,
    recompute,
    rotary_angles,
    runs_bare,
    sort_blocks,
    span_angles,
    stack_weights,
    take_rows,
    whole_sight,
)
from blt_core.types import Blocks, DecoderOutput, Latents, Output, Rows
from blt_plugins.local.latents import BareLatentAttention, LatentAttention, LatentMemory


@attrs.frozen(kw_only=True)
class LocalDecoderParams:
    """Sizes of the decoder.

    dim: width of its rows. layers: how many. heads: attention heads a layer.
    hidden: width of each feed-forward net. rope_theta: base of the rotary positions.
    latent_dim: width of the global model.

    slots: key vectors that each latent gives (k). window: how many bytes a row sees, itself
    included (None: all). denoises: trained on masked blocks. block_bytes: the sizes of these, which
    training notes here (None: not known). reads_byte_states: starts from the encoder's byte states
    (whose width, byte_dim, must be dim) and embeds no bytes itself.
    double_residual: rows add themselves twice to what they read of latents, as in the released BLT
    weights.
    """

    dim: int = attrs.field(validator=at_least(2))
    layers: int = attrs.field(validator=at_least(1))
    heads: int = attrs.field(validator=at_least(1))
    hidden: int = attrs.field(validator=at_least(1))
    latent_dim: int = attrs.field(validator=at_least(2))
    slots: int = attrs.field(default=2, validator=at_least(1))
    window: int | None = overridable(default=None, validator=at_least(1))
    rope_theta: float = attrs.field(default=500_000.0, validator=more_than(0))
    denoises: bool = trained(default=False)
    block_bytes: tuple[int, ...] | None = trained(
        default=None,
        validator=attrs.validators.optional(attrs.validators.deep_iterable(at_least(1))),
    )
    reads_byte_states: bool = False
    double_residual: bool = False

    def __attrs_post_init__(self) -> None:
        check_heads(self.dim, self.heads, self.heads)
        if self.denoises and self.reads_byte_states:
            raise ValueError("a decoder that reads byte states has no [MASK] entry: cannot denoise")
        if self.block_bytes and not self.denoises:
            raise ValueError("block_bytes: only a decoder that denoises was trained on blocks")


def abilities(params: LocalDecoderParams) -> frozenset[str]:
    """What this decoder offers, as configured."""
    names = ("denoises", "reads_byte_states")
    return frozenset(name for name in names if getattr(params, name))


@attrs.frozen(eq=False)
class LocalDecoderCache:
    """Keys/values of byte rows, and of latents (cross-attention), which grow apart."""

    rows: LayerCache[BareDecoderLayer]
    latents: RowCache


@attrs.frozen(eq=False, slots=False)
class RowPlan:
    """Where clean rows stand (span, angles), and where the latent that each reads is, (b, r).

    Rows may be packed; see ``span``.
    """

    span: Span
    angles: Tensor
    places_br: Tensor

    @cached_property
    def places(self) -> Tensor:
        """(b · r): where latents are."""
        return self.places_br.flatten()


@attrs.frozen(eq=False)
class BlockPlan:
    """Angles of block rows, where the latent of each block is (b, n), and what the rows see.

    order_bn: which blocks stand where, if they were sorted. subset: the batch rows that take part,
    where the others are left out.
    """

    angles: Tensor
    places_bn: Tensor
    sight: BlockSight
    order_bn: Tensor | None = None
    subset: Subset | None = None


@attrs.frozen(eq=False)
class PassPlan:
    """What all layers of a pass share; ``rows``: the cache, if there is one."""

    memory: LatentMemory
    clean: RowPlan | None
    blocks: BlockPlan | None
    rows: LayerCache[BareDecoderLayer] | None


def _as_it_is(x: Tensor) -> Tensor:
    return x


class LocalDecoder(nn.Module):
    """Cross-attention to one latent before each causal layer; a norm and a head at the end."""

    def __init__(self, params: LocalDecoderParams, context: BuildContext) -> None:
        super().__init__()
        if params.denoises and context.scheme.mask is None:
            raise ValueError("denoises: the model's id scheme has no [MASK] id (model.ids.mask)")
        self.denoises, self.reads_byte_states = params.denoises, params.reads_byte_states
        self.window, self.rope_theta = params.window, params.rope_theta
        self.head_dim = params.dim // params.heads
        self.slots = params.slots
        self.compiles: Compiler | None = None
        self._compiled = CompiledPass("decoder", run_layers)
        self.embed = (
            None if params.reads_byte_states else nn.Embedding(context.scheme.size, params.dim)
        )
        self.from_latent = Linear(params.latent_dim, params.slots * params.dim)
        self.layers = nn.ModuleList(
            DecoderLayer(
                params.dim, params.heads, params.hidden, double_residual=params.double_residual
            )
            for _ in range(params.layers)
        )
        self.norm = RMSNorm(params.dim)
        self.head = Linear(params.dim, context.scheme.size)
        initialise(self, params.layers)

    def new_cache(self, batch: int) -> LocalDecoderCache:
        """An empty cache; rows from the settled one on still read the latents that they read."""
        layers = bare_layers(
            self.layers, BareDecoderLayer.of, {*BARE_KINDS, DecoderLayer, LatentAttention}
        )
        ends = end_weights(self.embed, self.norm, self.head)
        rows = LayerCache(layers, batch, self.window, ends=ends)
        return LocalDecoderCache(rows, RowCache(batch, window=1))

    def forward(
        self,
        clean: Rows | None,
        blocks: Blocks | None,
        latents: Latents | None,
        cache: LocalDecoderCache | None,
    ) -> DecoderOutput:
        """Logits and hidden states of clean rows (b, r, …) and block rows (b, n, B, …)."""
        slots = None if latents is None else self._slots_of(latents)
        memory = LatentMemory(latents, cache.latents if cache is not None else None)
        rows = cache.rows if cache is not None else None
        x, row_plan, span = None, None, None
        if clean is not None:
            known = clean.extents_2b, clean.settled
            span = new_span(clean.ids_br, clean.lengths, rows, self.window, *known)
        if rows is not None and self.compiles is not None:
            done = self._run_compiled(clean, span, blocks, slots, memory, rows)
            if done is not None:
                return done
        if clean is not None and span is not None:
            x, row_plan = self._plan_rows(clean, span, memory, rows)
        y, block_plan = (
            self._plan_blocks(blocks, x, memory, rows) if blocks is not None else (None, None)
        )
        plan = PassPlan(memory, row_plan, block_plan, rows)
        bare = rows.layers if rows is not None and x is not None and runs_bare(x) else None
        for index, layer in enumerate(self.layers):
            x, y = layer(x, y, slots, plan, lane_of(index), bare[index] if bare else None)
        if y is not None and block_plan is not None and block_plan.order_bn is not None:
            y = take_rows(y, block_plan.order_bn.argsort(1))  # as they were given
        packing = None if row_plan is None else row_plan.span.packing
        subset = None if block_plan is None else block_plan.subset
        return DecoderOutput(self._output(x, packing), self._output(y, subset))

    def _run_compiled(
        self,
        clean: Rows | None,
        span: Span | None,
        blocks: Blocks | None,
        slots: Tensor | None,
        memory: LatentMemory,
        cache: LayerCache[BareDecoderLayer],
    ) -> DecoderOutput | None:
        """A pass over the cache as it is compiled; None for others, and where it cannot be."""
        layers, ends = cache.layers, cache.ends
        if not layers or ends is None or not runs_bare(self.head.weight):
            return None
        sizes = len(layers), self.head_dim, self.rope_theta
        rows = None if span is None else StaticRows.of(span, cache, *sizes)
        beside = None if blocks is None else StaticRows.of_blocks(blocks, cache, *sizes)
        if (rows is None and clean is not None) or (beside is None and blocks is not None):
            return None
        memories = [
            memory.of(layer.latent_attention, slots, lane_of(index))
            for index, layer in enumerate(self.layers)
        ]
        weights = cache.kept("weights", lambda: stack_weights(layers, ends))

        def run(rows: StaticRows, x: Tensor, places: Tensor) -> Output:
            for piece, each in weights:
                found = self._compiled(
                    self.compiles, rows.of_layers(piece), (x, places), each, memories[piece]
                )
                x = found[0]
            return Output(found[1], x)

        read, filled = None, None
        if clean is not None and rows is not None:
            x = clean.ids_br if self.embed is not None else clean.states_brD
            read = run(rows, x, memory.places(clean.latent_br))
        if blocks is not None and beside is not None:
            ids_bB = blocks.ids_bnB[:, 0]
            filled = run(beside, ids_bB, memory.places(blocks.latent_bn).expand_as(ids_bB))
            filled = Output(filled.logits[:, None], filled.hidden[:, None])
        return DecoderOutput(read, filled)

    def _slots_of(self, latents: Latents) -> Tensor:
        """(b, m, k, D)."""
        return self.from_latent(latents.values_bmD).unflatten(-1, (self.slots, -1))

    def _plan_rows(
        self, clean: Rows, span: Span, memory: LatentMemory, cache: RowCache | None
    ) -> tuple[Tensor, RowPlan]:
        x = clean.states_brD if self.embed is None else self.embed(clean.ids_br)
        angles = span_angles(span, self.head_dim, self.rope_theta)
        places = memory.places(clean.latent_br)
        span = span if cache is None else span.packed()
        if (packing := span.packing) is not None:
            x, places = packing.pack(x), packing.pack(places)
        return x, RowPlan(span, angles, places)

    def _plan_blocks(
        self, blocks: Blocks, clean: Tensor | None, memory: LatentMemory, cache: RowCache | None
    ) -> tuple[Tensor, BlockPlan]:
        order_bn = None
        if cache is None:  # neighbours see nearly the same keys
            blocks, order_bn = sort_blocks(blocks)
        device, size = blocks.start_bn.device, blocks.ids_bnB.shape[2]
        subset = None if cache is None else Subset.of(blocks.active, device, blocks.active_a)
        take = subset.take if subset is not None else _as_it_is
        start_bn = take(blocks.start_bn)
        positions = start_bn[..., None] + torch.arange(size, device=device)
        sizes = self.head_dim, self.rope_theta
        sight: BlockSight
        if cache is None:
            angles = rotary_angles(positions, *sizes)
            sight = whole_sight(
                blocks, window=self.window, rows=clean.shape[1], dtype=product_dtype(clean)
            )
        else:
            angles = known_angles(positions, max(cache.lengths) + size, *sizes)
            keys_bnt = take(cache.positions(device, blocks.cached_b))[:, None]
            causal_bn = None if blocks.causal_bn is None else take(blocks.causal_bn)
            sight = BlockMasks(*block_masks(start_bn, causal_bn, size, keys_bnt, self.window))
        places_bn = take(memory.places(blocks.latent_bn))
        return self.embed(take(blocks.ids_bnB)), BlockPlan(
            angles, places_bn, sight, order_bn, subset
        )

    def _output(self, x: Tensor | None, packing: Packing | Subset | None = None) -> Output | None:
        if x is None:
            return None
        hidden = self.norm(x)
        logits = self.head(hidden)
        if packing is not None:
            hidden, logits = packing.unpack(hidden), packing.unpack(logits)
        return Output(logits, hidden)


@attrs.frozen(eq=False)
class BareDecoderLayer:
    """The clean rows of a ``DecoderLayer`` over a cache; see ``blt_core.nn.bare``."""

    latent_attention: BareLatentAttention
    attention: BareAttention
    mlp: BareMLP
    double_residual: bool

    @classmethod
    def of(cls, layer: DecoderLayer) -> BareDecoderLayer:
        """The weights of a layer."""
        return cls(
            BareLatentAttention.of(layer.latent_attention),
            BareAttention.of(layer.attention_norm, layer.attention),
            BareMLP.of(layer.mlp_norm, layer.mlp),
            layer.double_residual,
        )

    def __call__(
        self,
        x: Tensor,
        latent_kv: Tensor,
        places: Tensor,
        angles: Tensor,
        span: SpanT,
        cache: Lanes[SpanT],
        lane: str,
    ) -> Tensor:
        """Clean rows (b, r, D), or packed; places (b · r): where the latent of each is."""
        read = self.latent_attention(x, latent_kv, places)
        x = read.add_(x, alpha=2) if self.double_residual else read.add_(x)
        return self.mlp(self.attention(x, angles, span, cache, lane))


def run_layers(
    rows: StaticRows,
    inputs: Sequence[Tensor],
    memories: Sequence[Tensor],
    weights: StackWeights[BareDecoderLayer],
) -> tuple[Tensor, ...]:
    """Clean rows (b, r, D) through layers over caches: what is compiled.

    inputs: the rows, or their ids, and where the latent of each is, (b, r), in what each layer
    remembers of them, the ``memories``. After the last layer: hidden states and logits.
    """
    x, places = inputs[0], inputs[1].flatten()
    if weights.embed is not None:
        x = functional.embedding(x, weights.embed)
    angles, (span, cache) = rows.angles, rows.open(x.dtype)
    for index, (bare, memory) in enumerate(zip(weights.layers, memories, strict=True)):
        x = bare(x, memory, places, angles, span, cache, lane_of(index))
    if weights.norm is None or weights.head is None:
        return (x,)
    hidden = norm(x, weights.norm)
    return hidden, product(hidden, weights.head)


class DecoderLayer(nn.Module):
    """x + latent attention, then x + self-attention, then x + mlp; see ``double_residual``."""

    def __init__(self, dim: int, heads: int, hidden: int, *, double_residual: bool) -> None:
        super().__init__()
        self.double_residual = double_residual
        self.latent_attention = LatentAttention(dim, heads)
        self.attention_norm = RMSNorm(dim)
        self.attention = SelfAttention(dim, heads, heads)
        self.mlp_norm = RMSNorm(dim)
        self.mlp = SwiGLU(dim, hidden)

    def forward(
        self,
        x: Tensor | None,
        y: Tensor | None,
        slots_bmkD: Tensor | None,
        plan: PassPlan,
        lane: str,
        bare: BareDecoderLayer | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Clean rows (b, r, D), or packed, and block rows (b, n, B, D), where there are any.

        All of a layer in one call, to which every tensor with a gradient is an argument: FSDP2
        gathers its weights for this call, and is done with their gradients when it has those of
        the arguments. bare: what runs the clean rows, over a cache, in place of its modules.
        """
        latent_kv = plan.memory.of(self.latent_attention, slots_bmkD, lane)
        keys, values = None, None
        if x is not None and plan.clean is not None:
            if bare is not None and plan.rows is not None:
                rows = plan.clean
                x = bare(x, latent_kv, rows.places, rows.angles, rows.span, plan.rows, lane)
            else:
                x, keys, values = recompute(self.clean, x, latent_kv, plan.clean, plan.rows, lane)
        if y is not None and plan.blocks is not None:
            if plan.rows is not None:
                used = plan.rows.used(lane)
                used = used if plan.blocks.subset is None else plan.blocks.subset.take_heads(used)
                keys, values = used.chunk(2, dim=-2)
            y = recompute(self.block, y, latent_kv, plan.blocks, keys, values)
        return x, y

    def clean(
        self, x: Tensor, latent_kv: Tensor, plan: RowPlan, cache: RowCache | None, lane: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Clean rows (b, r, D), and their own keys and values."""
        x = self._read(x[:, :, None], latent_kv, plan.places_br)[:, :, 0]
        attended, keys, values = self.attention(
            self.attention_norm(x), plan.angles, plan.span, cache, lane
        )
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), keys, values

    def block(
        self, y: Tensor, latent_kv: Tensor, plan: BlockPlan, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Block rows (b, n, B, D) over the clean keys and values (b, t, h, d)."""
        y = self._read(y, latent_kv, plan.places_bn)
        q, k, v = self.attention.project(self.attention_norm(y), plan.angles)
        attended = plan.sight.attend(q, k, v, keys, values)
        y = y + self.attention.out(attended.flatten(-2))
        return y + self.mlp(self.mlp_norm(y))

    def _read(self, x: Tensor, latent_kv: Tensor, places_bn: Tensor) -> Tensor:
        read: Tensor = self.latent_attention(x, latent_kv, places_bn)
        return (x + x if self.double_residual else x) + read


LOCAL_DECODER = Component(
    kind="decoder",
    name="local",
    factory=LocalDecoder,
    params=LocalDecoderParams,
    summary="cross-attention to latents in each layer, windowed causal rows, masked blocks",
    dims={"latent_dim": "latent_dim"},
    provides=abilities,
)
