"""What the rows of blocks see.

Axes: b batch rows, n blocks, B rows of a block, t clean key rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_masks(
    start_bn: Tensor, causal_bn: Tensor | None, size: int, keys_bnt: Tensor, window: int | None
) -> tuple[Tensor, Tensor | None]:
    """What rows of blocks of ``size`` bytes see: clean rows (b, n, B or 1, t), own (b, n, B, B).

    keys_bnt: positions of the clean keys (n may be 1); one below 0 is no key.

    All rows of a masked block see the window before its start; a row of a causal block sees what a
    clean row at its position would, less the clean rows from the block's start on.
    """
    behind = (start_bn[..., None] - keys_bnt)[:, :, None]  # (b, n, 1, t)
    before = (behind > 0) & (keys_bnt >= 0)[:, :, None]
    if causal_bn is None:
        return (before if window is None else before & (behind <= window)), None
    row = torch.arange(size, device=start_bn.device)
    ahead = row[:, None] - row  # of a row over another of its block
    own = (ahead >= 0) if window is None else (ahead >= 0) & (ahead < window)
    own = own | ~causal_bn[:, :, None, None]
    if window is None:
        return before, own
    reach = window - torch.where(causal_bn[..., None], row + 1, 0)  # (b, n, B)
    return before & (behind <= reach[..., None]), own
