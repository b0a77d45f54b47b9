"""Writing a draft byte by byte: what drafters share that ask a model for each.

Axes: b batch rows, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blt_core.protocols import DecodeOps
from blt_core.types import Draft, Draws, Sampling, StopRule


def write(
    ops: DecodeOps,
    limit: Sequence[int],
    logits_of: Callable[[Sequence[int]], Tensor],
    sampling: Sampling,
    draws: Draws,
    rule: StopRule | None,
) -> Draft:
    """At most ``limit[b]`` ids of each row, and what they were drawn from where q is wanted.

    logits_of(rows): (b, 1, V) for the next byte of the rows with ``rows[b] == 1``. A row ends at
    EOS, and where the rule ends it.
    """
    ids: list[list[int]] = [[] for _ in limit]
    steps: list[Tensor] = []
    left = list(limit)
    while any(left):
        rows = [int(n > 0) for n in left]
        logits = logits_of(rows)
        goes_on = [True] * len(limit)
        if rule is not None:
            beliefs = sampling.belief(logits)
            for row, on in enumerate(rows):
                if on:
                    rows[row], goes_on[row] = rule(row, beliefs[row])
        new = sampling.picks(logits, ops.lengths, rows, draws)
        ops.append(new)
        steps.append(logits)
        for row, token in enumerate(new):
            ids[row].extend(token)
            ended = token in ([], [ops.scheme.eos]) or not goes_on[row]
            left[row] = 0 if ended else left[row] - 1
    wanted = steps and draws.begins is not None
    return Draft(ids, sampling.probabilities(torch.cat(steps, dim=1)) if wanted else None)
