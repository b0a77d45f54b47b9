"""Torch layers that the model parts share; third-party parts may build on them too."""

from blt_core.nn.attention import attend, attend_blocks, rotary_angles, rotate, span_angles
from blt_core.nn.bare import (
    NORM_EPS,
    BareAttention,
    BareLayer,
    BareMLP,
    bare_layers,
    is_plain,
    norm,
    runs_bare,
)
from blt_core.nn.blocks import BlockMasks, BlockSight, sort_blocks, whole_sight
from blt_core.nn.cache import Lanes, LayerCache, RowCache, Seeing, Span, SpanT, lane_of, made_of
from blt_core.nn.compiled import (
    CompiledPass,
    StaticCache,
    StaticRows,
    StaticSpan,
    pieces,
    whole,
)
from blt_core.nn.layers import (
    BARE_KINDS,
    RMSNorm,
    SelfAttention,
    SwiGLU,
    Transformer,
    TransformerLayer,
    check_heads,
    initialise,
    new_span,
    read_weights_whole,
)
from blt_core.nn.linear import Kernels, Linear, product, product_dtype
from blt_core.nn.masks import block_masks
from blt_core.nn.packing import Packing, row_places, take_rows
from blt_core.nn.recompute import gradient_checkpointing, recompute
from blt_core.nn.row_table import RowTable

__all__ = [
    "BARE_KINDS",
    "NORM_EPS",
    "BareAttention",
    "BareLayer",
    "BareMLP",
    "BlockMasks",
    "BlockSight",
    "CompiledPass",
    "Kernels",
    "Lanes",
    "LayerCache",
    "Linear",
    "Packing",
    "RMSNorm",
    "RowCache",
    "RowTable",
    "Seeing",
    "SelfAttention",
    "Span",
    "SpanT",
    "StaticCache",
    "StaticRows",
    "StaticSpan",
    "SwiGLU",
    "Transformer",
    "TransformerLayer",
    "attend",
    "attend_blocks",
    "bare_layers",
    "block_masks",
    "check_heads",
    "gradient_checkpointing",
    "initialise",
    "is_plain",
    "lane_of",
    "made_of",
    "new_span",
    "norm",
    "pieces",
    "product",
    "product_dtype",
    "read_weights_whole",
    "recompute",
    "rotary_angles",
    "rotate",
    "row_places",
    "runs_bare",
    "sort_blocks",
    "span_angles",
    "take_rows",
    "whole",
    "whole_sight",
]
