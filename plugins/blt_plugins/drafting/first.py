"""Several drafters in order: for each text the first that proposes anything wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blt_core.component import BuildContext, Component, abilities_of, nested_table
from blt_core.decoding.drafting import propose
from blt_core.protocols import DecodeOps, Drafter
from blt_core.types import Draft, Draws, Sampling, StopRule


@attrs.frozen(kw_only=True)
class FirstParams:
    """drafters: tables under names of your choice, asked in the order in which they stand."""

    drafters: Mapping[str, Drafter] = nested_table("drafter", example="drafters.a.use = 'lookup'")


class FirstDrafter:
    """Asks each drafter for the batch rows that have no proposal yet.

    So a drafter that runs passes is asked only where a cheaper one before it had nothing to say.
    """

    def __init__(self, params: FirstParams, context: BuildContext) -> None:
        self.drafters = tuple(params.drafters.values())

    def draft(
        self,
        ops: DecodeOps,
        limit: Sequence[int],
        sampling: Sampling,
        draws: Draws,
        rule: StopRule | None = None,
    ) -> Draft:
        """The ids of the first drafter that proposes any, for each row."""
        ids: list[list[int]] = [[] for _ in limit]
        q = [torch.zeros(0, ops.scheme.size, dtype=torch.float64)] * len(limit)
        ended = [False] * len(limit)

        def watched(row: int, beliefs_kV: Tensor) -> tuple[int, bool]:
            kept, goes_on = rule(row, beliefs_kV) if rule is not None else (len(beliefs_kV), True)
            ended[row] = ended[row] or kept < len(beliefs_kV) or not goes_on
            return kept, goes_on

        for drafter in self.drafters:
            # A draft that was stopped before its first byte is over: there is none to ask for more.
            over = [bool(done) or end for done, end in zip(ids, ended, strict=True)]
            left = [0 if done else most for done, most in zip(over, limit, strict=True)]
            if not any(left):
                break
            begin = ops.lengths
            own_rule = watched if rule is not None else None
            proposed = propose(drafter, ops, left, sampling, draws, own_rule)
            ops.rewind(begin)
            for row, new in enumerate(proposed.ids):
                if new:
                    ids[row] = new
                if new and draws.begins is not None:
                    q[row] = proposed.probs(row, ops.scheme.size)
        return Draft(ids, pad_sequence(q, batch_first=True) if draws.begins is not None else None)


def first_abilities(params: FirstParams) -> frozenset[str]:
    """Those that all of its drafters have."""
    return frozenset.intersection(*map(abilities_of, params.drafters.values()))


FIRST = Component(
    kind="drafter",
    name="first",
    factory=FirstDrafter,
    params=FirstParams,
    summary="several drafters: for each text the first that proposes anything",
    provides=first_abilities,
)
