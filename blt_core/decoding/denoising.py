"""Filling a block of masked bytes: what block-diffusion samplers and drafters share.

Axes: b batch rows, B bytes of a block, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blt_core.faults import broken
from blt_core.protocols import DecodeOps, Unmasking
from blt_core.types import Draws, OpenBlock, Sampling

#: The stream of draws for blocks that are output; a model's own bytes are drawn on stream 0.
STREAM = 1

_PLACES = "unmasking.places"


class Filled(NamedTuple):
    """How a block was filled.

    passes: decoder passes. logits_bBV: what each byte that was masked was chosen from (of others
    without meaning); None if none was.
    """

    passes: int
    logits_bBV: Tensor | None

    def probabilities(self, block: OpenBlock, sampling: Sampling) -> Tensor:
        """(b, B): how likely each byte that was masked was when it was filled in; of others 1."""
        if self.logits_bBV is None:
            return torch.ones(len(block.ids), max(map(len, block.ids), default=0))
        size = self.logits_bBV.shape[1]
        belief_bBV = sampling.belief(self.logits_bBV)
        ids = torch.tensor([list(row) or [0] * size for row in block.ids])
        found = belief_bBV.gather(-1, ids[..., None])[..., 0]
        given = torch.tensor([[place < n for place in range(size)] for n in block.given])
        return found.masked_fill(given, 1.0)


def fill(
    ops: DecodeOps,
    block: OpenBlock,
    unmasking: Unmasking,
    sampling: Sampling,
    draws: Draws,
    *,
    stream: int = STREAM,
) -> Filled:
    """Fill all masks of ``block``, in place.

    Each pass predicts all masked bytes; ``unmasking`` says which of them to fill, ``sampling``
    chooses the ids (Fast BLT, arXiv 2605.08044, BLT-D). A batch row takes part until it is full.
    ``stream``: 0 for a draft, which then is drawn as the model's own bytes are. Raises
    ComponentError if the unmasking fills nothing, or gives no choice of places.
    """
    passes, logits_of = 0, None
    while any(masked := [ops.scheme.mask in ids for ids in block.ids]):
        logits_bBV = ops.denoise(block, masked).cpu()
        masked_bB = _masked(block, ops.scheme.mask, logits_bBV.shape[1])
        chosen = select(unmasking, sampling.belief(logits_bBV), masked_bB, block.start, draws)
        logits_of = _kept(logits_of, logits_bBV, chosen)
        rows = [logits_bBV.shape[1] if on else 0 for on in masked]
        picked = sampling.picks(logits_bBV, block.start, rows, draws, stream)
        for row, place in chosen.nonzero().tolist():
            block.ids[row][place] = picked[row][place]
        passes += 1
    return Filled(passes, logits_of)


def _kept(before: Tensor | None, now: Tensor, chosen: Tensor) -> Tensor:
    """The logits from which each place was filled so far."""
    return now if before is None else torch.where(chosen[..., None], now, before)


def select(
    unmasking: Unmasking,
    probs_bBV: Tensor,
    masked_bB: Tensor,
    starts: Sequence[int],
    draws: Draws,
) -> Tensor:
    """(b, B) bool: the masked places to fill now, at least one in each batch row that has any.

    For samplers, and for rules that hold another one. Raises ComponentError, which names the rule,
    for what is no such choice.
    """
    # A copy: a rule that writes to it must not change what is still to fill.
    chosen = unmasking.select(probs_bBV, masked_bB.clone(), starts, draws)
    if not isinstance(chosen, Tensor):
        raise broken(unmasking, f"selected {chosen!r}; expected a bool tensor (b, B)", _PLACES)
    if chosen.dtype != torch.bool or chosen.shape != masked_bB.shape:
        given = f"{chosen.dtype} of shape {tuple(chosen.shape)}"
        text = f"selected a tensor {given}; expected torch.bool of shape {tuple(masked_bB.shape)}"
        raise broken(unmasking, text, _PLACES)
    chosen = chosen.cpu() & masked_bB
    if not bool(chosen.any(-1).eq(masked_bB.any(-1)).all()):
        raise broken(unmasking, "fills no byte of a block that has masks", _PLACES)
    return chosen


def _masked(block: OpenBlock, mask: int | None, size: int) -> Tensor:
    """(b, B) bool: the places still to fill; none in a batch row that takes no part."""
    return torch.tensor([[t == mask for t in ids] or [False] * size for ids in block.ids])
