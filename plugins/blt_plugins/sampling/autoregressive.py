"""Autoregressive sampling, the baseline: one decoder pass a byte."""

from __future__ import annotations

import attrs

from blt_core.component import BuildContext, Component
from blt_core.protocols import DecodeOps
from blt_core.types import Draws, Round, Sampling


@attrs.frozen(kw_only=True)
class AutoregressiveParams:
    """Takes no keys; temperature and the like belong to the run."""


class Autoregressive:
    """Next logits, pick, append (Fast BLT). N_dec is one a byte."""

    true_logits = True

    def __init__(self, params: AutoregressiveParams, context: BuildContext) -> None:
        pass

    def check(self, sampling: Sampling) -> None:
        """Every sampling setting is served."""

    def round(self, ops: DecodeOps, sampling: Sampling, draws: Draws) -> Round:
        """One byte to every unfinished row."""
        fresh, rows = ops.fresh, [int(left > 0) for left in ops.remaining]
        logits = ops.next_logits(rows)[:, 0]
        picked = sampling.pick(logits, ops.lengths, rows, draws)
        ids = [[token] if on else [] for token, on in zip(picked, rows, strict=True)]
        ops.append(ids)
        return Round(ids, [0] * len(rows), [0] * len(rows), prefill=fresh)


AUTOREGRESSIVE = Component(
    kind="sampler",
    name="ar",
    factory=Autoregressive,
    params=AutoregressiveParams,
    summary="autoregressive: one decoder pass a byte",
)
