"""BLT-D: block diffusion, a block of bytes in a few decoder passes. Lossy."""

from __future__ import annotations

import attrs

from blt_core.component import BuildContext, Component, at_least, nested
from blt_core.decoding.denoising import fill
from blt_core.protocols import DecodeOps, Unmasking
from blt_core.types import Draws, Round, Sampling


@attrs.frozen(kw_only=True)
class BlockDiffusionParams:
    """block_bytes: bytes of a block (B). unmasking: which of them a pass fills."""

    block_bytes: int = attrs.field(default=8, validator=at_least(1))
    unmasking: Unmasking = nested("unmasking", default="confidence")


class BlockDiffusion:
    """Fill a block after the text, its open patch closed by force; commit it; go on.

    At most B decoder passes and one encoder + global pass a block (Fast BLT, BLT-D).
    """

    def __init__(self, params: BlockDiffusionParams, context: BuildContext) -> None:
        self.block_bytes = params.block_bytes
        self.unmasking = params.unmasking

    def check(self, sampling: Sampling) -> None:
        """Every sampling setting is served."""

    def round(self, ops: DecodeOps, sampling: Sampling, draws: Draws) -> Round:
        """A whole block to every unfinished row; what exceeds its limit is not output."""
        block = ops.open_block(self.block_bytes, start="frontier", closure="forced", scored=True)
        fill(ops, block, self.unmasking, sampling, draws)
        ops.append(block.ids)
        return Round([list(ids) for ids in block.ids], [0] * len(block.ids), [0] * len(block.ids))


BLOCK_DIFFUSION = Component(
    kind="sampler",
    name="blt-d",
    factory=BlockDiffusion,
    params=BlockDiffusionParams,
    summary="BLT-D: block diffusion, a block of bytes in a few passes (lossy)",
    requires=frozenset({"decoder.denoises"}),
)
