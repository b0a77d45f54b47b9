"""Counted passes, the parameters that each reads, and their price."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

#: The unit of weight traffic, 1e9 bytes.
GIGABYTES = "GB"


@attrs.frozen
class Passes:
    """Forward passes (NFE) that one request caused, counted as if it ran alone.

    decoder: N_dec. encoder: N_enc, passes of encoder + global model. encoder_bytes: passes of the
    encoder's byte part (equal to ``encoder`` unless the decoder reads byte states). scorer: passes
    of the patcher over new bytes. draft: decoder passes of other models that draft, and
    draft_parameters: how many parameters all of their passes read, those of their scorers aside.
    """

    decoder: int = 0
    encoder: int = 0
    encoder_bytes: int = 0
    scorer: int = 0
    draft: int = 0
    draft_parameters: int = 0

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.decoder + other.decoder,
            self.encoder + other.encoder,
            self.encoder_bytes + other.encoder_bytes,
            self.scorer + other.scorer,
            self.draft + other.draft,
            self.draft_parameters + other.draft_parameters,
        )


@attrs.frozen
class Parameters:
    """Parameter counts of each part. ``tables`` are look-ups: their bytes are not streamed."""

    decoder: int
    encoder: int
    global_model: int
    tables: int = 0
    scorer: int = 0


@attrs.frozen
class Cost:
    """What passes cost: the total, its lines, and lines shown apart from it, all in ``unit``.

    unit: "GB" is 1e9 bytes of weights that are read; a cost model that prices something else names
    its own, the same for all passes.
    """

    total: float
    lines: Mapping[str, float]
    apart: Mapping[str, float] = attrs.field(factory=dict)
    unit: str = GIGABYTES

    @property
    def gigabytes(self) -> float | None:
        """The total, where it is weight traffic; None in another unit."""
        return self.total if self.unit == GIGABYTES else None
