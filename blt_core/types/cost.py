"""Counted passes, the parameters that each reads, and their price."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import attrs

#: The unit of weight traffic, 1e9 bytes.
GIGABYTES = "GB"


@attrs.frozen
class Shape:
    """How wide the passes of a part were, and how much text each had before it.

    widths: (rows of a pass, how many such passes), by rows in ascending order. context: positions
    before the first row of each pass, added up: bytes, or patches for the global model.
    """

    widths: tuple[tuple[int, int], ...] = ()
    context: int = 0

    @property
    def passes(self) -> int:
        """How many passes these are."""
        return sum(count for _, count in self.widths)

    @property
    def rows(self) -> int:
        """The rows of all of them."""
        return sum(rows * count for rows, count in self.widths)

    def __add__(self, other: Shape) -> Shape:
        if not other.widths:
            return self
        widths = Counter(dict(self.widths))
        widths.update(dict(other.widths))
        return Shape(tuple(sorted(widths.items())), self.context + other.context)


@attrs.frozen(repr=False)
class Shapes:
    """The shapes of counted passes, by part; passes that nobody told the shape of are in none.

    decoder: passes over clean rows alone. blocks: decoder passes that denoise; their rows are the
    block's and the clean ones that run with it. encoder: of its byte part. global_model: its rows
    are patches. scorer: of the patcher.
    """

    decoder: Shape = Shape()
    blocks: Shape = Shape()
    encoder: Shape = Shape()
    global_model: Shape = Shape()
    scorer: Shape = Shape()

    def __repr__(self) -> str:
        told = attrs.asdict(self, recurse=False, filter=lambda _, shape: shape != Shape())
        return f"Shapes({', '.join(f'{part}={shape}' for part, shape in told.items())})"

    def __add__(self, other: Shapes) -> Shapes:
        return Shapes(
            self.decoder + other.decoder,
            self.blocks + other.blocks,
            self.encoder + other.encoder,
            self.global_model + other.global_model,
            self.scorer + other.scorer,
        )


@attrs.frozen
class Passes:
    """Forward passes (NFE) that one request caused, counted as if it ran alone.

    decoder: N_dec. encoder: N_enc, passes of encoder + global model. encoder_bytes: passes of the
    encoder's byte part (equal to ``encoder`` unless the decoder reads byte states). scorer: passes
    of the patcher over new bytes. draft: decoder passes of other models that draft, and
    draft_parameters: how many parameters all of their passes read, those of their scorers aside.
    shapes: how wide the passes were, those of other models aside; those of a whole batch have the
    rows of all texts that took part. In a batch they may be a few rows wider than alone: a forced
    block of one text drops rows of the others that only drafts had read.
    """

    decoder: int = 0
    encoder: int = 0
    encoder_bytes: int = 0
    scorer: int = 0
    draft: int = 0
    draft_parameters: int = 0
    shapes: Shapes = Shapes()

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.decoder + other.decoder,
            self.encoder + other.encoder,
            self.encoder_bytes + other.encoder_bytes,
            self.scorer + other.scorer,
            self.draft + other.draft,
            self.draft_parameters + other.draft_parameters,
            self.shapes + other.shapes,
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
