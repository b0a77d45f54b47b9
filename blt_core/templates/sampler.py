"""A sampler: one byte a round, from the model's own logits.

Change ``OneByOne.round``. Each round commits at least one id to every text that has any left, says
what it committed, and keeps nothing on ``self``: one instance serves all texts. Most ideas for
speed are drafters, which `speculative` makes lossless samplers of:
``blt new-plugin … --kind drafter``.

Try it:    blt plugins test sampler acme/name
Contracts: docs/kinds/sampler.md
"""

from __future__ import annotations

import attrs

from blt_core import Component, DecodeOps, Round, Sampling, hookimpl
from blt_core.component import BuildContext
from blt_core.types import Draws

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class OneByOneParams:
    """Takes no keys yet."""


class OneByOne:
    """What ``ar`` does."""

    #: The last logits of a round predicted all that it commits, and the bytes are ``ar``'s.
    true_logits = True

    def __init__(self, params: OneByOneParams, context: BuildContext) -> None:
        pass

    def check(self, sampling: Sampling) -> None:
        """Every setting is served; raise RequestError for one that is not."""

    def round(self, ops: DecodeOps, sampling: Sampling, draws: Draws) -> Round:
        """A byte for every text that is not over."""
        fresh = ops.fresh  # before the first pass, which reads the prompt
        rows = [int(left > 0) for left in ops.remaining]
        logits_bV = ops.next_logits(rows)[:, 0]
        picked = sampling.pick(logits_bV, ops.lengths, rows, draws)
        ids = [[token] if on else [] for token, on in zip(picked, rows, strict=True)]
        ops.append(ids)
        none = [0] * len(rows)
        return Round(ids, drafted=none, accepted=none, prefill=fresh)


@hookimpl
def blt_components() -> list[Component]:
    """The sampler."""
    return [Component("sampler", NAME, OneByOne, OneByOneParams, "one byte a round")]
