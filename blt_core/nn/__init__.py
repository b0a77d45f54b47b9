"""Torch layers that the model parts share; third-party parts may build on them too."""

from blt_core.nn.attention import attend, attend_blocks, rotary_angles, rotate
from blt_core.nn.blocks import BlockMasks, BlockSight, sort_blocks, whole_sight
from blt_core.nn.cache import RowCache, Span
from blt_core.nn.layers import (
    NORM_EPS,
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
from blt_core.nn.linear import Linear, product_dtype
from blt_core.nn.masks import block_masks
from blt_core.nn.packing import take_rows
from blt_core.nn.recompute import gradient_checkpointing, recompute

__all__ = [
    "NORM_EPS",
    "BlockMasks",
    "BlockSight",
    "Linear",
    "RMSNorm",
    "RowCache",
    "SelfAttention",
    "Span",
    "SwiGLU",
    "Transformer",
    "TransformerLayer",
    "attend",
    "attend_blocks",
    "block_masks",
    "check_heads",
    "gradient_checkpointing",
    "initialise",
    "new_span",
    "product_dtype",
    "read_weights_whole",
    "recompute",
    "rotary_angles",
    "rotate",
    "sort_blocks",
    "take_rows",
    "whole_sight",
]
