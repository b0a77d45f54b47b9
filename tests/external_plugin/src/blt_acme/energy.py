"""Joules: what it costs to move the weights, and so much for each pass besides."""

from __future__ import annotations

import attrs

from blt_core import BuildContext, Component, Cost, Parameters, Passes, at_least, more_than


@attrs.frozen(kw_only=True)
class EnergyParams:
    """picojoules_per_byte: of weights that are read. bytes_per_parameter: 2 is bf16.

    millijoules_per_pass: whatever a pass costs besides.
    """

    picojoules_per_byte: float = attrs.field(default=30.0, validator=more_than(0))
    bytes_per_parameter: float = attrs.field(default=2.0, validator=more_than(0))
    millijoules_per_pass: float = attrs.field(default=0.5, validator=at_least(0))


class Energy:
    """In joules."""

    def __init__(self, params: EnergyParams, context: BuildContext) -> None:
        self.read = params.picojoules_per_byte * params.bytes_per_parameter * 1e-12
        self.begun = params.millijoules_per_pass * 1e-3

    def cost(self, passes: Passes, parameters: Parameters) -> Cost:
        """Weights by part, and passes; the scorer's apart."""
        lines = {
            "decoder": self.read * passes.decoder * parameters.decoder,
            "encoder": self.read * passes.encoder_bytes * parameters.encoder,
            "global_model": self.read * passes.encoder * parameters.global_model,
            "draft_model": self.read * passes.draft_parameters,
            "passes": self.begun * (passes.decoder + passes.encoder + passes.draft),
        }
        apart = {"byte_scorer": self.read * passes.scorer * parameters.scorer}
        return Cost(sum(lines.values()), lines, apart, unit="J")


ENERGY = Component("cost_model", "acme/energy", Energy, EnergyParams, "energy in joules")
