"""Patches of a plan: as many and as long as those of a run, whose weights are not there.

Axes: b batch rows, r byte rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from blt_core.protocols import Patcher, ThresholdPatcher
from blt_core.types import Rows

#: The longest patch, in mean lengths, where a patcher sets no limit.
_LONGEST = 4


class PlannedPatches:
    """The patcher of a plan: it computes what the real one does, and then gives even patches.

    Where patches begin would depend on weights. A patcher without any is asked itself.
    """

    def __init__(self, patcher: Patcher, mean_bytes: float) -> None:
        self._patcher, self._mean = patcher, mean_bytes

    def new_cache(self, batch: int) -> Any:
        """The real one's."""
        return self._patcher.new_cache(batch)

    def flags(self, rows: Rows, cache: Any) -> Tensor:
        """(b, r) bool: as the real one's, but for their places."""
        longest: int | None = getattr(self._patcher, "max_patch_bytes", None)
        if isinstance(self._patcher, ThresholdPatcher):
            self._patcher.entropies(rows, cache)
        elif not isinstance(self._patcher, nn.Module):
            return self._patcher.flags(rows, cache)
        return even_flags(rows.ids_br, self._mean, longest or math.ceil(_LONGEST * self._mean))


def even_flags(ids_br: Tensor, mean_bytes: float, longest: int) -> Tensor:
    """(b, r) bool, place i is flag i + 1: patches with a mean length, as equal as can be.

    But for one of ``longest`` bytes, since some buffers are as wide as the longest patch.
    """
    width = ids_br.shape[1]
    flags = torch.zeros_like(ids_br, dtype=torch.bool)
    flags[:, 0] = True
    # BOS and the longest patch stand already.
    count = max(round(width / mean_bytes) - 2, 0)
    longest = min(longest, max(width - count, 1))
    if longest < width and count:
        places = longest + torch.arange(count) * (width - longest) / count
        flags[:, places.long()] = True
    return flags
