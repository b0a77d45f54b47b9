"""The bandwidth cost model: weight traffic of the counted passes, at batch size 1."""

from __future__ import annotations

import attrs

from blt_core.component import BuildContext, Component, more_than
from blt_core.types import Cost, Parameters, Passes


@attrs.frozen(kw_only=True)
class BandwidthParams:
    """bytes_per_parameter: 2 as in the paper (bf16); 1 gives the formula without the factor."""

    bytes_per_parameter: float = attrs.field(default=2.0, validator=more_than(0))


class Bandwidth:
    """GB = b · (N_dec · P_dec + N_enc · (P_enc + P_global)) / 1e9 (Fast BLT, arXiv 2605.08044).

    KV caches are left out. The byte scorer's traffic is shown apart, and so are n-gram tables: of
    these each byte reads a few rows, whatever the table's size, so their whole size is given once.
    A decoder that reads byte states runs the encoder more often than the global model; each such
    pass is priced with all of P_enc. A draft model has a line of its own, by its own size.
    """

    def __init__(self, params: BandwidthParams, context: BuildContext) -> None:
        self.bytes_per_parameter = params.bytes_per_parameter

    def cost(self, passes: Passes, parameters: Parameters) -> Cost:
        """Total GB and its lines; the scorer (traffic) and the tables (size) apart, in GB."""
        gb = self.bytes_per_parameter / 1e9
        lines = {
            "decoder": gb * passes.decoder * parameters.decoder,
            "encoder": gb * max(passes.encoder, passes.encoder_bytes) * parameters.encoder,
            "global_model": gb * passes.encoder * parameters.global_model,
        }
        if passes.draft_parameters:
            lines["draft_model"] = gb * passes.draft_parameters
        apart = {
            "byte_scorer": gb * passes.scorer * parameters.scorer,
            "ngram_tables_size": gb * parameters.tables,
        }
        return Cost(sum(lines.values()), lines, apart)


BANDWIDTH = Component(
    kind="cost_model",
    name="bandwidth",
    factory=Bandwidth,
    params=BandwidthParams,
    summary="weight traffic in GB at batch size 1, the paper's formula",
)
