"""How many drafted bytes stand, and what follows them, as laws: the output has the model's own law.

Drafted ids x_1 … x_k were drawn from q_1 … q_k, each given those before it; the model has p_1 … p_k
at these places, and p_{k+1} after them. Both laws are functions of these alone, in float64, so that
tests can sum them up exactly. Axes: k drafted bytes, V ids; before them any that drafts of one
length have in common, as those of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blt_core.types import AcceptanceLaw

#: law(ids_k, q_kV, p_jV), with k + 1 rows of p.
DraftLaw = Callable[["Sequence[int] | Tensor", Tensor, Tensor], AcceptanceLaw]


def rejection(ids_k: Sequence[int] | Tensor, q_kV: Tensor, p_jV: Tensor) -> AcceptanceLaw:
    """Speculative sampling (arXiv 2211.17192): x_i stands with probability min(1, p_i / q_i).

    The first that does not is replaced by a draw from the positive part of p_i - q_i.
    """
    ratio_k, p_kV, last_V = _compared(ids_k, q_kV, p_jV)
    keeps_k = ratio_k.clamp(max=1)
    reach_j = _cat(torch.ones_like(last_V[..., :1]), keeps_k.cumprod(-1))
    stands_j = _cat(reach_j[..., :-1] * (1 - keeps_k), reach_j[..., -1:])
    return AcceptanceLaw(stands_j, _next(p_kV - q_kV, last_V))


def block(ids_k: Sequence[int] | Tensor, q_kV: Tensor, p_jV: Tensor) -> AcceptanceLaw:
    """Block verification (arXiv 2403.10444): decides for the draft as a whole.

    It accepts as many bytes as ``rejection`` or more, on average.
    """
    ratio_k, p_kV, last_V = _compared(ids_k, q_kV, p_jV)
    weights = [torch.ones_like(last_V[..., 0])]
    for i in range(ratio_k.shape[-1]):
        weights.append((weights[-1] * ratio_k[..., i]).clamp(max=1))
    weight_j = torch.stack(weights, -1)
    excess_kV = weight_j[..., :-1, None] * p_kV - q_kV
    left_k = excess_kV.clamp(min=0).sum(-1)
    below_k = left_k + 1 - weight_j[..., :-1]
    # An empty beginning always may stand; of the others, the longest whose own coin says so does.
    keeps_j = _cat(_share(left_k, below_k, 1.0), weight_j[..., -1:])
    keeps_j[..., 0] = 1
    longer_j = (1 - keeps_j).flip(-1).cumprod(-1).flip(-1)
    stands_j = keeps_j * _cat(longer_j[..., 1:], torch.ones_like(keeps_j[..., :1]))
    return AcceptanceLaw(stands_j, _next(excess_kV, last_V))


def _compared(
    ids_k: Sequence[int] | Tensor, q_kV: Tensor, p_jV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(p / q of each drafted id, p at the drafted places, p after them)."""
    p_kV, last_V = p_jV[..., :-1, :], p_jV[..., -1, :]
    at = torch.as_tensor(ids_k, dtype=torch.long)[..., None]
    return (p_kV.gather(-1, at) / q_kV.gather(-1, at))[..., 0], p_kV, last_V


def _next(excess_kV: Tensor, last_V: Tensor) -> Tensor:
    """The law of the id after j that stand: of the excess, its positive part; any where none is."""
    positive = excess_kV.clamp(min=0)
    even = 1 / positive.shape[-1]
    return torch.cat((_share(positive, positive.sum(-1, True), even), last_V[..., None, :]), -2)


def _share(part: Tensor, whole: Tensor, otherwise: float) -> Tensor:
    """``part / whole``; ``otherwise`` where the whole is nothing."""
    there = whole > 0
    return torch.where(there, part / whole.where(there, 1.0), otherwise)


def _cat(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat((first, second), -1)
