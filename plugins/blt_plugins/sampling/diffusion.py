"""BLT-D: block diffusion, a block of bytes in a few decoder passes. Lossy."""

from __future__ import annotations

from typing import Literal

import attrs

from blt_core.component import BuildContext, Component, at_least, between, nested
from blt_core.decoding.denoising import STREAM, Filled, fill
from blt_core.protocols import DecodeOps, Unmasking
from blt_core.types import Draws, OpenBlock, Round, Sampling


@attrs.frozen(kw_only=True)
class BlockDiffusionParams:
    """block_bytes: bytes of a block (B). unmasking: which of them a pass fills.

    closure: "forced", as in the paper, counts the open patch as closed where the block begins.
    "none" has the model itself predict a block's first byte, and the rest read the newest latent.

    keep: a block ends before the first byte, but its own first, that was filled in with less
    probability than this; the next one begins there.
    """

    block_bytes: int = attrs.field(default=8, validator=at_least(1))
    unmasking: Unmasking = nested("unmasking", default="confidence")
    closure: Literal["forced", "none"] = "forced"
    keep: float = attrs.field(default=0.0, validator=between(0, 1))


class BlockDiffusion:
    """Fill a block after the text; commit it; go on.

    At most B decoder passes and one encoder + global pass a block (Fast BLT, BLT-D). With its open
    patch closed by force a block reads the latent of half a patch, which training has not shown to
    the model. Without, one pass over the text closes what is closed and gives the next byte; a
    block that stays within its patch then costs no pass of encoder and global model.
    """

    def __init__(self, params: BlockDiffusionParams, context: BuildContext) -> None:
        self.block_bytes = params.block_bytes
        self.unmasking = params.unmasking
        self.closure = params.closure
        self.keep = params.keep

    def check(self, sampling: Sampling) -> None:
        """Every sampling setting is served."""

    def round(self, ops: DecodeOps, sampling: Sampling, draws: Draws) -> Round:
        """A whole block to every unfinished row; what exceeds its limit is not output."""
        active = [left > 0 for left in ops.remaining]
        first: list[list[int]] = [[] for _ in active]
        if self.closure == "none":
            logits = ops.next_logits([int(on) for on in active])[:, 0]
            picked = sampling.pick(logits, ops.lengths, active, draws, STREAM)
            first = [[token] if on else [] for token, on in zip(picked, active, strict=True)]
            ops.append(first)
        new = self._filled(ops, self.block_bytes - len(max(first)), sampling, draws)
        ids = [[*own, *rest] for own, rest in zip(first, new, strict=True)]
        return Round(ids, [0] * len(ids), [0] * len(ids))

    def _filled(
        self, ops: DecodeOps, size: int, sampling: Sampling, draws: Draws
    ) -> list[list[int]]:
        """The bytes of a block at the end of each unfinished text, which are appended."""
        if not size:
            return [[] for _ in ops.lengths]
        forced = self.closure == "forced"
        block = ops.open_block(size, start="frontier", closure=self.closure, scored=forced)
        filled = fill(ops, block, self.unmasking, sampling, draws)
        new = self._kept(block, filled, sampling)
        ops.append(new)
        return new

    def _kept(self, block: OpenBlock, filled: Filled, sampling: Sampling) -> list[list[int]]:
        """The bytes of each block before its first unsure one; if forced, one at least."""
        if not self.keep:
            return [list(ids) for ids in block.ids]
        sure_bB = filled.probabilities(block, sampling) >= self.keep
        if self.closure == "forced":  # without, the model itself has said the byte before
            sure_bB[:, 0] = True
        counts = sure_bB.long().cumprod(-1).sum(-1).tolist()
        return [list(ids[:count]) for ids, count in zip(block.ids, counts, strict=True)]


BLOCK_DIFFUSION = Component(
    kind="sampler",
    name="blt-d",
    factory=BlockDiffusion,
    params=BlockDiffusionParams,
    summary="BLT-D: block diffusion, a block of bytes in a few passes (lossy)",
    requires=frozenset({"decoder.denoises"}),
)
