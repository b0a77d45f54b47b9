"""The cost model of prices: each kind of pass costs what the config says."""

from __future__ import annotations

import attrs

from blt_core.component import BuildContext, Component, at_least, more_than
from blt_core.types import Cost, Parameters, Passes


@attrs.frozen(kw_only=True)
class PerPassParams:
    """What passes cost, in any unit.

    The defaults are the weights that the 3B sizes of Fast BLT (arXiv 2605.08044) read, in those of
    a decoder pass.

    decoder: a decoder pass. latent: a pass of encoder and global model. draft: a draft model's
    decoder pass, with what goes with it.
    """

    decoder: float = attrs.field(default=1.0, validator=more_than(0))
    latent: float = attrs.field(default=17.8, validator=at_least(0))
    draft: float = attrs.field(default=1.0, validator=at_least(0))


class PerPass:
    """decoder · N_dec + latent · N_enc + draft · N_draft, whatever the model's sizes."""

    def __init__(self, params: PerPassParams, context: BuildContext) -> None:
        self._params = params

    def cost(self, passes: Passes, parameters: Parameters) -> Cost:
        """The total and its lines, in the unit of the prices."""
        lines = {
            "decoder": self._params.decoder * passes.decoder,
            "latents": self._params.latent * passes.encoder,
        }
        if passes.draft:
            lines["draft_model"] = self._params.draft * passes.draft
        return Cost(sum(lines.values()), lines, unit="units")


PER_PASS = Component(
    kind="cost_model",
    name="per-pass",
    factory=PerPass,
    params=PerPassParams,
    summary="prices of your own for passes of the decoder and of the large parts",
)
