"""The training layout for tests: whole texts with blocks at chosen places.

Axes: n blocks, B bytes of a block, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch

from blt_core.model import Model
from blt_core.testing.reference import latent_of_row, true_flags
from blt_core.types import Blocks, DecoderOutput, Rows

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}


def random_ids(model: Model, length: int, seed: int) -> list[int]:
    """BOS and ``length - 1`` random bytes, spaces and letters more often than others."""
    rng = Random(seed)
    return [
        model.scheme.bos,
        *(rng.choice((32, 97, rng.randrange(256))) for _ in range(length - 1)),
    ]


def aligned_starts(flags: Sequence[bool], length: int) -> list[int]:
    """First bytes of the patches 1.. of a text: where training has blocks."""
    return [i for i in range(1, length) if flags[i]]


def noise(model: Model, ids: Sequence[int], start: int, size: int, rng: Random) -> list[int]:
    """``size`` ids from ``start`` on, some of them masked, some wrong, past the end all masked."""
    mask = model.scheme.mask
    bytes_ = [ids[i] if i < len(ids) else mask for i in range(start, start + size)]
    return [rng.choice((b, mask, rng.randrange(256))) for b in bytes_]


def forward(
    model: Model,
    ids: Sequence[int],
    flags: Sequence[bool],
    blocks: Sequence[Sequence[int]] = (),
    starts: Sequence[int] = (),
) -> DecoderOutput:
    """One text under flags 0..n, with blocks that read the latent of the row before them."""
    given = None
    if blocks:
        reads = [latent_of_row(flags, start - 1) for start in starts]
        given = Blocks(
            torch.tensor([[list(b) for b in blocks]]), torch.tensor([starts]), torch.tensor([reads])
        )
    rows = Rows(torch.tensor([list(ids)]), (len(ids),))
    return model.forward(rows, torch.tensor([list(flags[1:])]), given)


def flags_of(model: Model, ids: Sequence[int]) -> list[bool]:
    """The patcher's own flags 0..n."""
    return true_flags(model, ids)
