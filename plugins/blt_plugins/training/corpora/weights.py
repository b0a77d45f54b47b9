"""How often documents are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from blt_core.protocols import Documents


def weights_of(documents: Documents) -> Sequence[tuple[int, float]]:
    """(documents, passes over them in one pass) of consecutive runs."""
    weights: Sequence[tuple[int, float]] | None = getattr(documents, "weights", None)
    return [(len(documents), 1.0)] if weights is None else weights
