"""How often masked rows, and the model itself, name the right byte of held-out text.

A block is wholly masked (t = 1) and reads only clean bytes before its start, in the training
layout, whose rows are those of generation. Axes: b batch rows, r byte rows, n blocks, B bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import attrs
import torch
from torch import Tensor

from blt_core.errors import DataError
from blt_core.model import Model, patch_layout
from blt_core.protocols import UNSCORED
from blt_core.types import Blocks
from blt_plugins.training.block_diffusion import ids_from, sample_starts
from blt_plugins.training.windows import Batch

Starts = Literal["aligned", "inside"]
STARTS: tuple[Starts, ...] = ("aligned", "inside")


@attrs.frozen
class BlockAccuracy:
    """Shares of right bytes at each place of a block, and how many bytes each place has.

    starts: "aligned" with patches, or "inside" of one (the block reads the newest closed latent).
    masked: by the rows of a masked block, all in one pass. autoregressive: by the model's own
    next-byte rows, of the same bytes.
    """

    starts: Starts
    counts: tuple[int, ...]
    masked: tuple[float, ...]
    autoregressive: tuple[float, ...]

    @property
    def first_ratio(self) -> float:
        """Masked accuracy over the model's own, on the first byte of blocks."""
        return self.masked[0] / self.autoregressive[0] if self.autoregressive[0] else 0.0


@torch.no_grad()
def block_accuracy(
    model: Model, batches: Iterable[Batch], block_bytes: int, starts: Starts, *, seed: int = 0
) -> BlockAccuracy:
    """Measure blocks at every patch start, or at as many random bytes inside of patches.

    Raises DataError if the text has no such byte.
    """
    rng = torch.Generator().manual_seed(seed)
    counts, masked, own = (torch.zeros(block_bytes, dtype=torch.long) for _ in range(3))
    for batch in batches:
        scored, block_right, own_right = _right(model, batch, block_bytes, starts, rng)
        counts += scored.sum((0, 1)).cpu()
        masked += (block_right & scored).sum((0, 1)).cpu()
        own += (own_right & scored).sum((0, 1)).cpu()
    if counts[0] == 0:
        raise DataError(f"no held-out byte to start a block at ({starts})")
    per = counts.clamp(min=1)
    return BlockAccuracy(
        starts,
        tuple(counts.tolist()),
        tuple((masked / per).tolist()),
        tuple((own / per).tolist()),
    )


def _right(
    model: Model, batch: Batch, block_bytes: int, starts: Starts, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(scored, right by masked rows, right by clean rows), each (b, n, B)."""
    flags_br = model.patcher.flags(batch.rows, None)
    text_br = batch.targets_br != UNSCORED
    opens_br = flags_br & text_br
    places_br = opens_br if starts == "aligned" else text_br & ~flags_br
    start_bn = sample_starts(places_br, opens_br.sum(1), rng)
    truth_bnB = ids_from(start_bn, batch.targets_br, block_bytes)
    scored = truth_bnB != UNSCORED
    start_bn = start_bn.clamp(min=1)
    latent_bn = patch_layout(flags_br, batch.rows.lengths)[1].gather(1, start_bn - 1)
    mask = torch.full_like(truth_bnB, model.scheme.mask or 0)
    output = model.forward(batch.rows, flags_br, Blocks(mask, start_bn, latent_bn))
    if output.clean is None or output.blocks is None:
        raise ValueError("the decoder gave no output for clean rows or for blocks")
    best_br = _best(model, output.clean.logits)
    own_bnB = ids_from(start_bn, best_br, block_bytes)
    return scored, _best(model, output.blocks.logits) == truth_bnB, own_bnB == truth_bnB


def _best(model: Model, logits: Tensor) -> Tensor:
    """The likeliest ids that can be output."""
    never = torch.tensor(model.scheme.never_output, device=logits.device)
    return logits.index_fill(-1, never, float("-inf")).argmax(-1)
