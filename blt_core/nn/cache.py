"""The one cache of the torch layers: ragged rows, grown as needed, with a window if there is one.

Axes: b batch rows, r new rows, t stored rows. A cache keeps *lanes*, tensors of shape (b, t, …)
that share one bookkeeping: keys and values of each layer, an id history, … Row i of batch row b
stands for position i and lies at place ``i - base[b]`` of each lane.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from blt_core.errors import EngineError
from blt_core.nn.packing import Packing


@attrs.frozen(eq=False)
class Span:
    """New rows on their way into a cache (or into none): which positions, and what they see.

    starts: position of the first new row of each batch row. place: where in the lanes the new rows
    go, if it is one place and one count in all batch rows (else None). positions_br: int64; padding
    repeats the last valid position. lo, hi: the places of each lane that any new row sees.
    mask_brt: bool or None. When ``from_start`` (all rows begin at position 0) rows are plainly
    causal and no mask is kept. packing: between attentions the rows are packed so (None: padded).
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    positions_br: Tensor
    lo: int
    hi: int
    mask_brt: Tensor | None
    from_start: bool
    window: int | None
    place: int | None = None
    packing: Packing | None = None

    @classmethod
    def whole(
        cls, counts: Sequence[int], width: int, window: int | None, device: torch.device
    ) -> Span:
        """The span of whole sequences without a cache; ``width`` is the padded length r."""
        batch = len(counts)
        positions = torch.arange(width, device=device).expand(batch, width)
        return cls((0,) * batch, tuple(counts), positions, 0, width, None, True, window)


class RowCache:
    """Lanes of remembered rows for a batch; see the module's docstring.

    ``window`` W: a row at position p sees (p - W, p]; what lies more than W and ``keep`` behind
    the settled length may be dropped to make room.
    """

    def __init__(self, batch: int, window: int | None = None, keep: int = 0) -> None:
        self.lengths = [0] * batch
        self._base = [0] * batch
        self._settled = [0] * batch
        self._window, self._keep = window, keep
        self._capacity = 0
        self._lanes: dict[str, Tensor] = {}

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget the rows after ``lengths``. Raises EngineError below a settled length."""
        for row, length in enumerate(lengths):
            if length < self._settled[row]:
                raise EngineError(
                    f"batch row {row}: cannot rewind to {length}, rows below "
                    f"{self._settled[row]} are settled"
                )
            self.lengths[row] = min(self.lengths[row], length)

    def settle(self, lengths: Sequence[int]) -> None:
        """Promise never to rewind below ``lengths`` (capped at what is stored)."""
        for row, length in enumerate(lengths):
            self._settled[row] = max(self._settled[row], min(length, self.lengths[row]))

    def reorder(self, rows: Sequence[int]) -> None:
        """Batch row b becomes a copy of what row ``rows[b]`` was."""
        self.lengths = [self.lengths[row] for row in rows]
        self._base = [self._base[row] for row in rows]
        self._settled = [self._settled[row] for row in rows]
        self._lanes = {
            name: lane.index_select(0, torch.tensor(rows, device=lane.device))
            for name, lane in self._lanes.items()
        }

    def extend(self, counts: Sequence[int], width: int, device: torch.device) -> Span:
        """Make room for ``counts[b]`` new rows (padded to ``width``) and say what they see."""
        starts = tuple(self.lengths)
        self._reserve(counts)
        self.lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        places = {*zip(starts, counts, self._base, strict=True)}
        place = starts[0] - self._base[0] if len(places) == 1 else None
        if not any(starts):
            whole = Span.whole(counts, width, self._window, device)
            return attrs.evolve(whole, hi=max(width, 1), place=place)
        return self._span(starts, tuple(counts), width, place, device)

    def _span(
        self,
        starts: tuple[int, ...],
        counts: tuple[int, ...],
        width: int,
        place: int | None,
        device: torch.device,
    ) -> Span:
        reach = self._window or max(starts) + width
        hi = max(s + c - b for s, c, b in zip(starts, counts, self._base, strict=True))
        # Padding repeats the last valid position, so that its softmax is never over nothing.
        last = [max(s + c - 1, 0) for s, c in zip(starts, counts, strict=True)]
        first_seen = [max(min(s, p) - reach + 1, 0) for s, p in zip(starts, last, strict=True)]
        lo = max(min(f - b for f, b in zip(first_seen, self._base, strict=True)), 0)
        if place is not None and counts[0] == width == 1:
            positions = torch.full((len(starts), 1), starts[0], device=device)
            return Span(starts, counts, positions, lo, hi, None, False, self._window, place)
        positions = torch.minimum(
            torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device),
            torch.tensor(last, device=device)[:, None],
        )
        keys_bt = self.positions(lo, hi, device)
        ahead = positions[:, :, None] - keys_bt[:, None, :]
        mask = (ahead >= 0) & (ahead < reach)
        return Span(starts, counts, positions, lo, hi, mask, False, self._window, place)

    def positions(self, lo: int, hi: int, device: torch.device) -> Tensor:
        """(b, hi - lo): the position that each place of the lanes stands for."""
        base = torch.tensor(self._base, device=device)[:, None]
        return base + torch.arange(lo, hi, device=device)

    def places_before(self, starts: Sequence[int]) -> tuple[int, int]:
        """The places that rows starting at ``starts`` may see: windows before each start."""
        reach = self._window or max(starts)
        lo = min(max(s - reach, 0) - b for s, b in zip(starts, self._base, strict=True))
        hi = max(s - b for s, b in zip(starts, self._base, strict=True))
        return max(lo, 0), max(hi, 0)

    def write(self, lane: str, span: Span, values_br: Tensor) -> None:
        """Store the new rows ``values_br`` (b, r, …) of one lane."""
        stored = self._lane(lane, values_br)
        if span.place is not None:
            count = span.counts[0]
            stored[:, span.place : span.place + count] = values_br[:, :count]
            return
        places = zip(span.starts, self._base, span.counts, strict=True)
        for row, (start, base, count) in enumerate(places):
            stored[row, start - base : start - base + count] = values_br[row, :count]

    def read(self, lane: str, lo: int, hi: int | None) -> Tensor:
        """(b, hi - lo, …): the places [lo, hi) of one lane (to its end if ``hi`` is None)."""
        return self._lanes[lane][:, lo:hi]

    def has(self, lane: str) -> bool:
        """Whether anything was ever written to ``lane``."""
        return lane in self._lanes

    def _lane(self, name: str, like: Tensor) -> Tensor:
        lane = self._lanes.get(name)
        if lane is None or lane.shape[1] < self._capacity:
            grown = like.new_zeros((len(self.lengths), self._capacity, *like.shape[2:]))
            if lane is not None:
                grown[:, : lane.shape[1]] = lane
            self._lanes[name] = lane = grown
        return lane

    def _reserve(self, counts: Sequence[int]) -> None:
        def needed() -> int:
            ends = zip(self.lengths, counts, self._base, strict=True)
            return max(length + count - base for length, count, base in ends)

        if needed() <= self._capacity:
            return
        if self._window is not None:
            self._drop_settled(max(self._window, self._keep))
        # Half again as much as is needed: growth stays amortised, a window stays bounded.
        if needed() > self._capacity * 3 // 4:
            self._capacity = max(needed() * 3 // 2, 64)
        for name, lane in list(self._lanes.items()):
            self._lane(name, lane)

    def _drop_settled(self, kept_behind: int) -> None:
        for row, settled in enumerate(self._settled):
            shift = max(settled - kept_behind, 0) - self._base[row]
            kept = self.lengths[row] - self._base[row] - shift
            if shift <= 0:
                continue
            for lane in self._lanes.values():
                lane[row, :kept] = lane[row, shift : shift + kept].clone()
            self._base[row] += shift
