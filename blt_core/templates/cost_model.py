"""A cost model: the energy of counted passes, in joules, at so much a parameter that is read.

Change ``Energy.cost``, and the unit. Lines add up to the total, more passes never cost less, and
all figures are finite and not negative.

Try it:    blt plugins test cost_model acme/name
Contracts: docs/kinds/cost_model.md
"""

from __future__ import annotations

import attrs

from blt_core import BuildContext, Component, Cost, Parameters, Passes, hookimpl, more_than

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class EnergyParams:
    """picojoules: of a parameter that is read in a pass; measure yours."""

    picojoules: float = attrs.field(default=100.0, validator=more_than(0))


class Energy:
    """Each pass reads all parameters of its part; look-up tables and the scorer are left out."""

    def __init__(self, params: EnergyParams, context: BuildContext) -> None:
        self.joules = params.picojoules * 1e-12

    def cost(self, passes: Passes, parameters: Parameters) -> Cost:
        """The total, and its lines, in joules."""
        lines = {
            "decoder": self.joules * passes.decoder * parameters.decoder,
            "encoder": self.joules * passes.encoder_bytes * parameters.encoder,
            "global_model": self.joules * passes.encoder * parameters.global_model,
            "draft_model": self.joules * passes.draft_parameters,
        }
        return Cost(sum(lines.values()), lines, unit="J")


@hookimpl
def blt_components() -> list[Component]:
    """The cost model."""
    return [Component("cost_model", NAME, Energy, EnergyParams, "energy in joules")]
