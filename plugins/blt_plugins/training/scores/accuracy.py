"""How often masked rows, and the model itself, name the right byte of held-out text.

A block is wholly masked (t = 1) and reads only clean bytes before its start, in the training
layout, whose rows are those of generation. Axes: b batch rows, r byte rows, n blocks, B bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import attrs
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blt_core.model import Model, patch_layout
from blt_core.protocols import UNSCORED
from blt_core.types import Blocks
from blt_plugins.training.data.windows import Batch
from blt_plugins.training.objectives.block_diffusion import ids_from, sample_starts
from blt_plugins.training.scores.held_out import Total, greedy_ids

Starts = Literal["aligned", "inside"]
STARTS: tuple[Starts, ...] = ("aligned", "inside")

#: Blocks of each batch row in one pass, which bound its memory.
BLOCKS = 256


@attrs.frozen
class BlockAccuracy:
    """Shares of right bytes at each place of a block, and how many bytes each place has.

    starts: "aligned" with patches, or "inside" of one (the block reads the newest closed latent).
    masked: by the rows of a masked block, all in one pass. autoregressive: by the model's own
    next-byte rows, of the same bytes. Both are None at a place without a byte.
    """

    starts: Starts
    counts: tuple[int, ...]
    masked: tuple[float | None, ...]
    autoregressive: tuple[float | None, ...]

    @property
    def ratios(self) -> tuple[float | None, ...]:
        """Masked accuracy over the model's own at each place; None where that is 0 or none."""
        pairs = zip(self.masked, self.autoregressive, strict=True)
        return tuple(m / own if m is not None and own else None for m, own in pairs)


@torch.no_grad()
def block_accuracy(
    model: Model, batches: Iterable[Batch], block_bytes: int, starts: Starts, *, seed: int = 0
) -> BlockAccuracy:
    """Measure blocks at every patch start, or at as many random bytes inside of patches."""
    rng = torch.Generator().manual_seed(seed)
    sums = torch.zeros(3, block_bytes, dtype=torch.long)
    for batch in batches:
        flags_br = model.patcher.flags(batch.rows, None)
        text_br = batch.targets_br != UNSCORED
        opens_br = flags_br & text_br
        places_br = opens_br if starts == "aligned" else text_br & ~flags_br
        start_bn = sample_starts(places_br, opens_br.sum(1), rng)
        for (some_bn,) in _passes(start_bn):
            sums += _right(model, batch, flags_br, some_bn, block_bytes).cpu()
    counts, masked, own = sums.tolist()
    return BlockAccuracy(starts, tuple(counts), _shares(masked, counts), _shares(own, counts))


def _passes(*of_blocks: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors (b, n, …) of the same blocks, cut along n into what one pass may hold."""
    for parts in zip(*(each.split(BLOCKS, dim=1) for each in of_blocks), strict=True):
        if parts[0].numel():
            yield parts


def _right(
    model: Model, batch: Batch, flags_br: Tensor, start_bn: Tensor, block_bytes: int
) -> Tensor:
    """(3, B): scored bytes at each place, and those that masked rows and clean rows name right."""
    truth_bnB = ids_from(start_bn, batch.targets_br, block_bytes)
    scored = truth_bnB != UNSCORED
    mask = torch.full_like(truth_bnB, model.scheme.mask or 0)
    masked_bnB, own_br = _block_ids(model, batch, flags_br, start_bn, mask)
    own_bnB = ids_from(start_bn.clamp(min=1), own_br, block_bytes)
    right = (scored, scored & (masked_bnB == truth_bnB), scored & (own_bnB == truth_bnB))
    return torch.stack([each.sum((0, 1)) for each in right])


def _shares(parts: Sequence[int], counts: Sequence[int]) -> tuple[float | None, ...]:
    return tuple(n / of if of else None for n, of in zip(parts, counts, strict=True))


@torch.no_grad()
def masked_accuracy(
    model: Model,
    batches: Iterable[Batch],
    block_bytes: int,
    rates: Sequence[float],
    total: Total = list,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Share of masked bytes that one pass names right, by the rate at which bytes were masked.

    In blocks at an eighth of the patch starts, of the training layout; the same blocks for each
    rate. A rate without a masked byte has no entry. batches: of this process, which may have none;
    total: adds up what the processes have found.
    """
    sums = {rate: [0, 0] for rate in rates}
    for batch in batches:
        flags_br = model.patcher.flags(batch.rows, None)
        starts, draws = _drawn(batch, flags_br, block_bytes, seed)
        for some_bn, noise in _passes(starts, draws):
            truth = ids_from(some_bn, batch.targets_br, block_bytes)
            scored = truth != UNSCORED
            for rate, counts in sums.items():
                hidden = scored & (noise < rate)
                given = truth.masked_fill(hidden | ~scored, model.scheme.mask or 0)
                found = _block_ids(model, batch, flags_br, some_bn, given)[0]
                counts[0] += int((hidden & (found == truth)).sum())
                counts[1] += int(hidden.sum())
    shared = list(map(round, total([count for counts in sums.values() for count in counts])))
    pairs = zip(sums, shared[::2], shared[1::2], strict=True)
    return {str(rate): right / of for rate, right, of in pairs if of}


def _drawn(batch: Batch, flags_br: Tensor, block_bytes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Starts (b, n), 0 for padding, and noise (b, n, B) that decides what a rate hides.

    A row's are drawn by its own ids, so they are the same in whichever batch and process it is.
    """
    opens_br = (flags_br & (batch.targets_br != UNSCORED)).cpu()
    ids_br = batch.rows.ids_br.cpu()
    starts, noise = [], []
    for row, length in enumerate(batch.rows.lengths):
        text = ids_br[row, :length].numpy().tobytes()
        digest = hashlib.sha256(f"{seed}/".encode() + text).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        opens = opens_br[row : row + 1, :length]
        starts.append(sample_starts(opens, opens.sum(1) / 8, rng)[0])
        noise.append(torch.rand((len(starts[-1]), block_bytes), generator=rng))
    start_bn, noise_bnB = (pad_sequence(each, batch_first=True) for each in (starts, noise))
    return start_bn.to(flags_br.device), noise_bnB.to(flags_br.device)


def _block_ids(
    model: Model, batch: Batch, flags_br: Tensor, start_bn: Tensor, ids_bnB: Tensor
) -> tuple[Tensor, Tensor]:
    """The likeliest ids of block rows (b, n, B), and of clean rows (b, r)."""
    start_bn = start_bn.clamp(min=1)
    latent_bn = patch_layout(flags_br, batch.rows.lengths)[1].gather(1, start_bn - 1)
    output = model.forward(batch.rows, flags_br, Blocks(ids_bnB, start_bn, latent_bn))
    if output.clean is None or output.blocks is None:
        raise ValueError("the decoder gave no output for clean rows or for blocks")
    return (
        greedy_ids(output.blocks.logits, model.scheme),
        greedy_ids(output.clean.logits, model.scheme),
    )
