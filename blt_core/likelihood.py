"""The log-probabilities of ids, and of others in their places. Axes: r rows, V ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import Tensor

#: Rows that are in float64 at a time.
CHUNK = 4096


@attrs.frozen
class Likelihood:
    """The log-probability of one id, in nats, and the likeliest ids at its place.

    Over all V ids, whatever sampling would do: not scaled, nothing left out. top: (id, its
    log-probability), the likeliest first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def likelihoods(logits_rV: Tensor, ids: Sequence[int], top: int) -> Iterator[Likelihood]:
    """Those of ``ids``, one a row, by the softmax over all ids, in float64."""
    for begin in range(0, len(ids), CHUNK):
        chunk = ids[begin : begin + CHUNK]
        logprobs = logits_rV[begin : begin + CHUNK].cpu().double().log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(chunk).view(-1, 1))[:, 0].tolist()
        # A stable sort: of equal ones the lower id comes first.
        ordered = logprobs.sort(dim=-1, descending=True, stable=True) if top else None
        for row, (token, value) in enumerate(zip(chunk, own, strict=True)):
            best: tuple[tuple[int, float], ...] = ()
            if ordered is not None:
                places = ordered.indices[row, :top].tolist()
                best = tuple(zip(places, ordered.values[row, :top].tolist(), strict=True))
            yield Likelihood(token, value, best)
