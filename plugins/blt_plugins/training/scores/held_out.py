"""Held-out bits per byte, in the layout that generation uses.

Axes: b batch rows, r byte rows, V ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from blt_core.errors import DataError
from blt_core.model import Model
from blt_core.protocols import UNSCORED, ByteScorer
from blt_core.types import IdScheme
from blt_plugins.training.data.windows import Batch

#: Gives the sums over all processes of values that each has summed over its own batches.
Total = Callable[[Sequence[float]], list[float]]


@attrs.frozen
class HeldOut:
    """A held-out score.

    bits_per_byte: nats of all bytes and EOS, by ln 2 and the number of bytes. top1: share of bytes
    and EOS that the model would output greedily. mean_patch_bytes: of the patches
    after BOS. bits_per_byte_without_eos: by the nats of the bytes alone, as rolling perplexity
    elsewhere.
    """

    bits_per_byte: float
    bytes: int
    top1: float
    mean_patch_bytes: float | None = None
    bits_per_byte_without_eos: float | None = None


@torch.no_grad()
def evaluate_model(model: Model, batches: Iterable[Batch], total: Total = list) -> HeldOut:
    """Score whole windows with the model's own patches.

    batches: of this process, which may have none; total: adds up what the processes have found.
    Raises DataError where none has a byte.
    """
    patches = 0

    def logits(batch: Batch) -> Tensor:
        nonlocal patches
        flags = model.patcher.flags(batch.rows, None)
        # Place i is flag i + 1, which is that of target i.
        patches += int((flags & _bytes(batch, model.scheme)).sum())
        output = model.forward(batch.rows, flags).clean
        if output is None:
            raise ValueError("the decoder gave no output for clean rows")
        return output.logits

    sums = _sums(logits, batches, model.scheme)
    *shared, opened = total([*sums, patches])
    result = _score(shared)
    return attrs.evolve(result, mean_patch_bytes=result.bytes / max(round(opened), 1))


@torch.no_grad()
def evaluate_scorer(
    scorer: ByteScorer, batches: Iterable[Batch], scheme: IdScheme, total: Total = list
) -> HeldOut:
    """Score whole windows with the byte scorer; batches and total as in :func:`evaluate_model`."""
    return _score(total(_sums(lambda batch: scorer.logits(batch.rows, None), batches, scheme)))


def greedy_ids(logits: Tensor, scheme: IdScheme) -> Tensor:
    """(…): the likeliest ids that may be output, of logits (…, V)."""
    never = torch.tensor(scheme.never_output, dtype=torch.long, device=logits.device)
    return logits.index_fill(-1, never, float("-inf")).argmax(-1)


def _bytes(batch: Batch, scheme: IdScheme) -> Tensor:
    """(b, r) bool: the scored targets that are bytes."""
    return (batch.targets_br != UNSCORED) & (batch.targets_br != scheme.eos)


def _sums(
    logits: Callable[[Batch], Tensor], batches: Iterable[Batch], scheme: IdScheme
) -> tuple[float, float, int, int, int]:
    """Nats, those of EOS; targets that are bytes, that are named right, and how many there are."""
    nats, ends, size, right, scored = 0.0, 0.0, 0, 0, 0
    for batch in batches:
        targets = batch.targets_br.flatten()
        found = logits(batch).flatten(0, 1)
        found = found if found.dtype == torch.float64 else found.float()
        losses = functional.cross_entropy(found, targets, ignore_index=UNSCORED, reduction="none")
        nats += float(losses.cpu().double().sum())
        ends += float(losses.masked_fill(targets != scheme.eos, 0.0).cpu().double().sum())
        right += int((greedy_ids(found, scheme) == targets).sum())
        scored += int((targets != UNSCORED).sum())
        size += int(_bytes(batch, scheme).sum())
    return nats, ends, size, right, scored


def _score(sums: Sequence[float]) -> HeldOut:
    """The score of what :func:`_sums` gives, added up; a mean of processes may round counts."""
    (nats, ends), (size, right, scored) = sums[:2], map(round, sums[2:])
    if size == 0:
        raise DataError("no held-out text to score: the documents are empty")
    bits, bits_of_bytes = (each / math.log(2) / size for each in (nats, nats - ends))
    return HeldOut(bits, size, right / scored, bits_per_byte_without_eos=bits_of_bytes)
