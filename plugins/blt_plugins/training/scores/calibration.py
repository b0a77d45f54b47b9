"""The threshold that gives patches of a wanted mean length on given text.

Entropies of a document of n bytes: place i is that of the prediction of byte i + 1 (nats).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs
import torch
from torch import Tensor

from blt_core.errors import DataError, RunError
from blt_core.protocols import ThresholdPatcher
from blt_plugins.training.data.windows import Batch


@attrs.frozen
class Calibration:
    """A threshold (nats) and what it does: mean patch length and how many patches of each length.

    ``histogram[n]`` counts the patches of n bytes. ``reached``: whether the mean is within 2 % of
    the target, which very short texts or a low ``max_patch_bytes`` may rule out.
    """

    threshold: float
    mean_patch_bytes: float
    target_patch_bytes: float
    bytes: int
    patches: int
    histogram: dict[int, int]

    @property
    def reached(self) -> bool:
        """Whether the mean is as good as the target."""
        return abs(self.mean_patch_bytes / self.target_patch_bytes - 1) <= 0.02  # noqa: PLR2004


def calibrate(patcher: ThresholdPatcher, batches: Iterable[Batch], target: float) -> Calibration:
    """The calibration of ``patcher`` to a mean of ``target`` bytes; nothing is changed.

    Raises DataError for a target outside of 1 to ``max_patch_bytes``, or text without a byte,
    RunError for entropies that are no finite numbers.
    """
    limit = patcher.max_patch_bytes
    if not 1 <= target <= (limit or float("inf")):
        raise DataError(
            f"a mean patch length of {target} bytes cannot be reached: patches have 1 to "
            f"{limit or 'any number of'} bytes (max_patch_bytes)"
        )
    entropies = measure(patcher, batches)
    if not entropies:
        raise DataError("no text to calibrate on: all the files are empty")
    if not all(bool(row.isfinite().all()) for row in entropies):
        raise RunError(
            "the byte scorer's entropies are no finite numbers, so no threshold can be found\n"
            "  fix: its weights are damaged or its training diverged; train it anew"
        )
    threshold = find_threshold(entropies, limit, target)
    return summarise(entropies, limit, threshold, target)


def measure(patcher: ThresholdPatcher, batches: Iterable[Batch]) -> list[Tensor]:
    """The entropies of the bytes of each window that has any, as float64 vectors."""
    found = []
    for batch in batches:
        values = patcher.entropies(batch.rows).cpu().double()
        found += [row[:size] for row, size in zip(values, batch.sizes, strict=True) if size]
    return found


def find_threshold(entropies: Sequence[Tensor], limit: int | None, target: float) -> float:
    """The threshold whose mean patch length is nearest to ``target``, by bisection.

    The mean never falls as the threshold rises: merging two runs of bytes never makes more patches.
    """
    values = torch.cat(list(entropies)).unique()
    # Thresholds midway between neighbours, so that rounding never decides a flag.
    steps = [0.0, *((values[1:] + values[:-1]) / 2).tolist(), float(values[-1]) + 1.0]
    low, high = 0, len(steps) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if _mean(entropies, limit, steps[middle]) < target:
            low = middle
        else:
            high = middle
    near = min((low, high), key=lambda i: abs(_mean(entropies, limit, steps[i]) - target))
    return float(round(steps[near], 6))


def summarise(
    entropies: Sequence[Tensor], limit: int | None, threshold: float, target: float
) -> Calibration:
    """What ``threshold`` does to the texts."""
    lengths = patch_lengths(entropies, limit, threshold)
    sizes, counts = lengths.unique(return_counts=True)
    return Calibration(
        threshold=threshold,
        mean_patch_bytes=float(lengths.double().mean()),
        target_patch_bytes=target,
        bytes=int(lengths.sum()),
        patches=len(lengths),
        histogram=dict(zip(sizes.tolist(), counts.tolist(), strict=True)),
    )


def patch_lengths(entropies: Sequence[Tensor], limit: int | None, threshold: float) -> Tensor:
    """Lengths of all patches after BOS, in no particular order.

    An unsure byte opens a run; a run of n bytes makes patches of ``limit`` and one of the rest.
    """
    runs = []
    for row in entropies:
        opens = row > threshold
        opens[0] = True
        starts = opens.nonzero()[:, 0]
        runs.append(torch.diff(starts, append=torch.tensor([len(row)])))
    lengths = torch.cat(runs)
    if limit is None:
        return lengths
    rest = lengths % limit
    full = torch.full((int((lengths // limit).sum()),), limit)
    return torch.cat((full, rest[rest > 0]))


def _mean(entropies: Sequence[Tensor], limit: int | None, threshold: float) -> float:
    return float(patch_lengths(entropies, limit, threshold).double().mean())
