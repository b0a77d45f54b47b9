"""How many drafted bytes stand, and what follows them, as laws: the output has the model's own law.

Drafted ids x_1 … x_k were drawn from q_1 … q_k, each given those before it; the model has p_1 … p_k
at these places, and p_{k+1} after them. Both laws are functions of these alone, in float64, so that
tests can sum them up exactly. Axes: k drafted bytes, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blt_core.types import AcceptanceLaw

#: law(ids, q_kV, p_jV), with k + 1 rows of p.
DraftLaw = Callable[[Sequence[int], Tensor, Tensor], AcceptanceLaw]


def rejection(ids: Sequence[int], q_kV: Tensor, p_jV: Tensor) -> AcceptanceLaw:
    """Speculative sampling (arXiv 2211.17192): x_i stands with probability min(1, p_i / q_i).

    The first that does not is replaced by a draw from the positive part of p_i - q_i.
    """
    count = len(ids)
    p, q = _of(p_jV, ids), _of(q_kV, ids)
    keeps = torch.minimum(torch.ones_like(p), p / q)
    reach = torch.cat((keeps.new_ones(1), keeps.cumprod(0)))
    stands = torch.cat((reach[:-1] * (1 - keeps), reach[-1:]))
    return AcceptanceLaw(stands, torch.cat((_residual(p_jV[:count] - q_kV), p_jV[count:])))


def block(ids: Sequence[int], q_kV: Tensor, p_jV: Tensor) -> AcceptanceLaw:
    """Block verification (arXiv 2403.10444): decides for the draft as a whole.

    It accepts as many bytes as ``rejection`` or more, on average.
    """
    count = len(ids)
    p, q = _of(p_jV, ids).tolist(), _of(q_kV, ids).tolist()
    weight, weights = 1.0, [1.0]
    for i in range(count):
        weight = min(weight * p[i] / q[i], 1.0)
        weights.append(weight)
    excess = [weights[i] * p_jV[i] - q_kV[i] for i in range(count)]
    keeps = []
    for i in range(count):
        left = float(excess[i].clamp(min=0).sum())
        below = left + 1 - weights[i]
        keeps.append(left / below if below > 0 else 1.0)
    keeps.append(weights[count])
    # The longest beginning whose own coin says so stands; an empty one always may.
    keeps[0] = 1.0
    stands, longer = [0.0] * (count + 1), 1.0
    for j in range(count, -1, -1):
        stands[j] = longer * keeps[j]
        longer *= 1 - keeps[j]
    rows = [_residual(each[None])[0] for each in excess]
    return AcceptanceLaw(p_jV.new_tensor(stands), torch.stack([*rows, p_jV[count]]))


def _of(probs: Tensor, ids: Sequence[int]) -> Tensor:
    """The probability of each drafted id, in float64."""
    return probs[: len(ids)].gather(1, torch.tensor(ids).view(-1, 1))[:, 0]


def _residual(excess: Tensor) -> Tensor:
    """The positive part, as a distribution; any where there is none, since it is not drawn from."""
    positive = excess.clamp(min=0)
    total = positive.sum(-1, keepdim=True)
    even = torch.full_like(positive, 1 / positive.shape[-1])
    return torch.where(total > 0, positive / total.where(total > 0, torch.ones_like(total)), even)
