"""The drafter of BLT-DV: a block of masked bytes, filled by the decoder in a few passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import attrs
import torch

from blt_core.component import BuildContext, Component, abilities_of, at_least, nested
from blt_core.decoding.denoising import fill
from blt_core.protocols import DecodeOps, Unmasking
from blt_core.types import Draft, Draws, Sampling, StopRule


@attrs.frozen(kw_only=True)
class DiffusionParams:
    """block_bytes: bytes of a block (B). unmasking: which of them a pass fills.

    start: "aligned" begins the block at the open patch, as in training, with the committed bytes
    given; "frontier" at the next byte. closure of a frontier block: "forced" closes the open patch
    (as the paper does, one more encoder + global pass), "none" reads the newest latent.
    """

    block_bytes: int = attrs.field(default=8, validator=at_least(1))
    unmasking: Unmasking = nested("unmasking", default="all")
    start: Literal["aligned", "frontier"] = "aligned"
    closure: Literal["forced", "none"] = "forced"


class DiffusionDrafter:
    """Open a block, fill it, propose its new bytes (Fast BLT, BLT-DV)."""

    def __init__(self, params: DiffusionParams, context: BuildContext) -> None:
        self.block_bytes, self.unmasking = params.block_bytes, params.unmasking
        self.start, self.closure = params.start, params.closure

    def draft(
        self,
        ops: DecodeOps,
        limit: Sequence[int],
        sampling: Sampling,
        draws: Draws,
        rule: StopRule | None = None,
    ) -> Draft:
        """The bytes of a block that are not committed yet, drawn as verification draws them."""
        block = ops.open_block(
            self.block_bytes,
            start=self.start,
            closure=self.closure,
            active=[most > 0 for most in limit],
        )
        filled = fill(ops, block, self.unmasking, sampling, draws, stream=0)
        ids = [row[given:] for row, given in zip(block.ids, block.given, strict=True)]
        if filled.logits_bBV is None:
            return Draft([[] for _ in limit])
        own = [logits[given:] for logits, given in zip(filled.logits_bBV, block.given, strict=True)]
        if rule is not None:
            room = [min(len(new), most) for new, most in zip(ids, limit, strict=True)]
            limit = [
                rule(row, sampling.belief(own[row][:n]))[0] if n else 0
                for row, n in enumerate(room)
            ]
        q = None
        if draws.begins is not None:
            q = sampling.probabilities(torch.nn.utils.rnn.pad_sequence(own, batch_first=True))
        return Draft(ids, q).cut(limit)


def diffusion_abilities(params: DiffusionParams) -> frozenset[str]:
    """A block that is filled from left to right, or at once, is drawn from what stands before."""
    in_order = "in_order" in abilities_of(params.unmasking)
    return frozenset({"stops_early", "gives_q"} if in_order else {"stops_early"})


DIFFUSION = Component(
    kind="drafter",
    name="diffusion",
    factory=DiffusionDrafter,
    params=DiffusionParams,
    summary="a block of masked bytes, filled in a few passes (BLT-DV)",
    requires=frozenset({"decoder.denoises"}),
    provides=diffusion_abilities,
)
