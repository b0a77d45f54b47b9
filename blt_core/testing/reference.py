"""The plain reference: what a decode state must equal. No caches, one text at a time, no tricks.

Flags are given, not computed, because every operation of the engine is a full forward of some
prefix under some flags: a true pass under the patcher's own; a draft with unknown flags cleared; a
forced block with the last one set. Axes: n ids of a text (BOS first), V ids, B bytes of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from blt_core.model import Model
from blt_core.types import Blocks, DecoderOutput, Latents, Patches, Rows


def true_flags(model: Model, ids: Sequence[int]) -> list[bool]:
    """Flags 0..n of a text of n ids, the lookahead flag included."""
    rows = Rows(torch.tensor([list(ids)]), (len(ids),))
    return [True, *model.patcher.flags(rows, None)[0].tolist()]


def patches_of(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """(start, size) of each patch that is closed under flags 0..n."""
    starts = [i for i, flag in enumerate(flags) if flag]
    return [(a, b - a) for a, b in pairwise(starts)]


def latent_of_row(flags: Sequence[bool], row: int) -> int:
    """The latent that row i reads: that of the patch before the one that byte i + 1 is in."""
    patch_of_next_byte = sum(flags[: row + 2]) - 1
    return patch_of_next_byte - 1


def row_logits(model: Model, ids: Sequence[int], flags: Sequence[bool]) -> Tensor:
    """(n, V): the logits of every clean row of a text under flags 0..n."""
    return _forward(model, ids, flags, None).clean.logits[0]  # type: ignore[union-attr]


def block_logits(
    model: Model, ids: Sequence[int], flags: Sequence[bool], block: Sequence[int], start: int
) -> Tensor:
    """(B, V): the logits of a block at ``start`` after the first ``start`` ids.

    A block reads the latent that the clean row before it reads; all starts and closures follow
    from that rule and the flags.
    """
    blocks = Blocks(
        torch.tensor([[list(block)]]),
        torch.tensor([[start]]),
        torch.tensor([[latent_of_row(flags, start - 1)]]),
    )
    return _forward(model, ids, flags, blocks).blocks.logits[0, 0]  # type: ignore[union-attr]


@torch.inference_mode()
def _forward(
    model: Model, ids: Sequence[int], flags: Sequence[bool], blocks: Blocks | None
) -> DecoderOutput:
    closed = patches_of(flags)
    rows = Rows(torch.tensor([list(ids)]), (len(ids),))
    states = model.encoder.byte_states(rows, None)
    patches = Patches(
        torch.tensor([[start for start, _ in closed]]),
        torch.tensor([[size for _, size in closed]]),
        (len(closed),),
    )
    embeddings = Latents(model.encoder.patch_embeddings(states, patches), patches.counts)
    latents = Latents(model.global_model.forward(embeddings, None), patches.counts)
    reads = torch.tensor([[latent_of_row(flags, i) for i in range(len(ids))]])
    given = states if model.decoder.reads_byte_states else None
    clean = Rows(rows.ids_br, rows.lengths, reads, given)
    return model.decoder.forward(clean, blocks, latents, None)
