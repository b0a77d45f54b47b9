"""The one cache of the torch layers: ragged rows in rings, which hold a window if there is one.

Axes: b batch rows, r new rows, t places of a lane. A cache keeps *lanes*, tensors of shape
(b, t, …) that share one bookkeeping: keys and values of each layer, an id history, … Position p of
any batch row lies at place p mod t of its lane, so all rows of a batch have one shape, however far
apart they stand, and a rewind is a shorter length.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import attrs
import torch
from torch import Tensor

from blt_core.errors import EngineError
from blt_core.nn.packing import Packing, row_places, take_rows

if TYPE_CHECKING:
    from blt_core.nn.bare import EndWeights

#: Rows that a ring holds beyond what its window needs: drafts, and the open patch, as a rule.
SLACK = 32
#: Rings are this many places long, or a multiple.
_STEP = 16

L = TypeVar("L")
T = TypeVar("T")


class Seeing(Protocol):
    """What attention and bare layers ask of new rows: a :class:`Span`, or one that is compiled."""

    @property
    def window(self) -> int | None:
        """How many rows a row sees, itself included."""

    @property
    def from_start(self) -> bool:
        """Whether they are the first, and see their own keys alone."""

    @property
    def packing(self) -> Packing | None:
        """How they are packed between attentions."""

    def bias(self, dtype: torch.dtype, /) -> Tensor | None:
        """Which places of a lane each sees; see :class:`Span`."""


SpanT = TypeVar("SpanT", bound=Seeing)
SpanT_contra = TypeVar("SpanT_contra", bound=Seeing, contravariant=True)


class Lanes(Protocol[SpanT_contra]):
    """What bare layers ask of a cache: a :class:`RowCache`, or one that is compiled."""

    def write(
        self, lane: str, span: SpanT_contra, values_br: Tensor, /, *, heads: bool = False
    ) -> None:
        """Store new rows of a lane."""

    def read(self, lane: str, span: SpanT_contra, /) -> Tensor:
        """(b, t, …): the places of a lane that they see."""


@attrs.frozen(eq=False)
class Slots:
    """Where the valid rows of a span go: all (p) int64.

    batch_p, places_p: batch row and place in its lane. rows_p: which they are of (b · r); None
    where all rows are valid.
    """

    batch_p: Tensor
    places_p: Tensor
    rows_p: Tensor | None

    def valid(self, values_br: Tensor) -> Tensor:
        """(p, …): the valid ones of (b, r, …)."""
        values = values_br.flatten(0, 1)
        return values if self.rows_p is None else values.index_select(0, self.rows_p)


@attrs.frozen(eq=False, slots=False)
class Span:
    """New rows on their way into a cache (or into none): which positions, and what they see.

    Of a prompt that is longer than a ring, which sees its own keys, the cache keeps the end.

    starts: position of the first new row of each batch row; counts: how many are new. width: r, of
    which rows beyond the count are padding. size: places of the cache's lanes, None without one.
    packing: between attentions the rows are packed so (None: padded). sent_2b: starts and counts,
    where they are on the device already. stored: the slots, where they are known already.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    width: int
    window: int | None
    device: torch.device
    size: int | None = None
    packing: Packing | None = None
    sent_2b: Tensor | None = None
    stored: Slots | None = None

    @classmethod
    def whole(
        cls, counts: Sequence[int], width: int, window: int | None, device: torch.device
    ) -> Span:
        """The span of whole sequences without a cache; ``width`` is the padded length r."""
        return cls((0,) * len(counts), tuple(counts), width, window, device)

    @cached_property
    def from_start(self) -> bool:
        """Whether all rows begin at position 0: then they see their own keys alone."""
        return not any(self.starts)

    @cached_property
    def start(self) -> int | None:
        """Where all batch rows begin, if they add equally many rows and no padding; else None."""
        first, count = self.starts[0], self.counts[0]
        alike = all(start == first for start in self.starts)
        return first if alike and all(n == count == self.width for n in self.counts) else None

    @cached_property
    def end(self) -> int:
        """The first position after the new rows and their padding, of any batch row."""
        return max(self.starts) + self.width

    @cached_property
    def extents_2b(self) -> Tensor:
        """(2, b) int64: starts and counts, on the device."""
        if self.sent_2b is not None:
            return self.sent_2b
        return torch.tensor((self.starts, self.counts), device=self.device)

    @cached_property
    def positions_br(self) -> Tensor:
        """(b or 1, r) int64; padding repeats the last valid position."""
        steps = torch.arange(self.width, device=self.device)
        if self.start is not None:
            return (steps + self.start)[None]
        if self.size is None:
            return steps[None]
        starts, counts = self.extents_2b[..., None]
        # So that the softmax of a padding row is never over nothing.
        return torch.minimum(starts + steps, (starts + counts - 1).clamp(min=0))

    @cached_property
    def seen(self) -> slice:
        """The places of each lane that any new row sees."""
        size = self.size or 0
        if self.start is not None and self.width == 1:
            reach = min(self.window or self.end, self.end)
            first = (self.end - reach) % size
            if first + reach <= size:
                return slice(first, first + reach)
        ends = zip(self.starts, self.counts, strict=True)
        return slice(0, min(size, max(s + n for s, n in ends)))

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """(b or 1, 1, r, t): 0 where a row sees a place of ``seen``, -inf elsewhere; None: all.

        In ``dtype``, that of the queries.
        """
        biases: dict[torch.dtype, Tensor | None] = self._biases
        if dtype not in biases:
            biases[dtype] = self._bias(dtype)
        return biases[dtype]

    @cached_property
    def _biases(self) -> dict[torch.dtype, Tensor | None]:
        return {}

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        seen, size = self.seen, self.size or 0
        if self.start is not None and self.width == 1:
            if self.window is None or seen.stop - seen.start == min(self.window, self.end):
                return None
            # Which places a row sees turns with its position: a view of two turns shows it.
            at = self.start % size
            row = _turns(self.window, size, dtype, self.device)[size - at : 2 * size - at]
            # Kernels elsewhere want masks that begin at an even address.
            row = row if row.is_cpu else row.clone()
            return row[None, None, None]
        positions = self.positions_br[..., None]
        behind = positions - torch.arange(seen.stop, device=self.device)
        if self.end > size:
            behind = behind % size
        # A place behind by more than the position would stand for one below 0.
        visible = (behind >= 0) & (behind <= positions)
        visible = visible if self.window is None else visible & (behind < self.window)
        return torch.zeros(visible.shape, dtype=dtype, device=self.device).masked_fill_(
            ~visible, float("-inf")
        )[:, None]

    @cached_property
    def slots(self) -> Slots:
        """Where the valid rows of all batch rows go, or the last ones, if a ring holds no more."""
        if self.stored is not None:
            return self.stored
        size = self.size or self.width
        batch_p, step_p = self._valid(size)
        places_p = (self.extents_2b[0][batch_p] + step_p) % size
        whole = all(n == self.width <= size for n in self.counts)
        return Slots(batch_p, places_p, None if whole else batch_p * self.width + step_p)

    def packed(self) -> Span:
        """The same, with a packing if there is enough padding."""
        packing = Packing.of(self.counts, self.width, self._valid_places)
        if packing is None:
            return self
        sent_2b, stored = self.extents_2b, self.slots
        return attrs.evolve(self, packing=packing, sent_2b=sent_2b, stored=stored)

    def _valid_places(self) -> Tensor:
        """(p): which of (b · r) the valid rows are."""
        if self.slots.rows_p is not None and self.width <= (self.size or self.width):
            return self.slots.rows_p
        batch_p, step_p = self._valid(self.width)
        return batch_p * self.width + step_p

    def _valid(self, most: int) -> tuple[Tensor, Tensor]:
        """(p), (p): batch rows and steps of the valid rows, of each batch row the last ``most``."""
        counts_b, total = self.extents_2b[1], sum(min(n, most) for n in self.counts)
        kept_b = counts_b.clamp(max=most)
        batch_p = torch.repeat_interleave(kept_b, output_size=total)
        skipped_b = counts_b - kept_b.cumsum(0)  # the rest of the row, less what stands before it
        return batch_p, torch.arange(total, device=self.device) + skipped_b[batch_p]


@cache
def _turns(window: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2 · size): 0 where place j is less than ``window`` behind place 0, counting round, or -inf.

    From place size - p on it is what a row at place p sees.
    """
    with torch.inference_mode(mode=False):
        behind = -torch.arange(2 * size, device=device) % size
        hidden = torch.full((2 * size,), float("-inf"), dtype=dtype, device=device)
        return hidden.masked_fill_(behind < window, 0.0)


class RowCache:
    """Lanes of remembered rows for a batch; see the module's docstring.

    ``window`` W (None: all): a row at position p sees (p - W, p]; what lies more than W and
    ``keep`` behind the settled length is overwritten, or never written, of a prompt. Lanes hold
    everything else, whatever the passes were: with a window they have one length for almost all of
    their life. They grow where more than SLACK rows are unsettled, and shrink when that is over and
    they are more than twice as long as they need to be: so drafts that are always long resize
    nothing. Without a window they grow by powers of two.
    """

    def __init__(self, batch: int, window: int | None = None, keep: int = 0) -> None:
        self.lengths = [0] * batch
        self._settled = [0] * batch
        self.window = window
        self._behind = None if window is None else max(window, keep)
        self._size = 0
        # As they are seen, (b, t, …): those of heads lie in memory as (b, h, t, d).
        self._lanes: dict[str, Tensor] = {}
        self._views: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

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
        if self._behind is not None and self._size > 2 * ring_size(self._behind):
            fitting = self._fitting(self.lengths)
            if 2 * fitting < self._size:
                self._resize(fitting)

    def reorder(self, rows: Sequence[int]) -> None:
        """Batch row b becomes a copy of what row ``rows[b]`` was."""
        self.lengths = [self.lengths[row] for row in rows]
        self._settled = [self._settled[row] for row in rows]
        self._lanes = {
            name: _chosen(lane, torch.tensor(rows, device=lane.device))
            for name, lane in self._lanes.items()
        }
        self._views.clear()

    @property
    def size(self) -> int:
        """Places of each lane."""
        return self._size

    def extend(
        self,
        counts: Sequence[int],
        width: int,
        device: torch.device,
        extents_2b: Tensor | None = None,
        settled: Sequence[int] | None = None,
    ) -> Span:
        """Make room for ``counts[b]`` new rows (padded to ``width``) and say what they see.

        extents_2b: where they begin and how many they are, if the device knows already. settled:
        with the first rows of all texts, a promise as of :meth:`settle` that goes for them too:
        lanes with a window keep the end alone, and the rows must see their own keys.
        """
        starts = tuple(self.lengths)
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        if settled is not None and not any(starts):
            self._settled = [min(n, end) for n, end in zip(settled, ends, strict=True)]
        fitting = self._fitting(ends)
        if fitting > self._size:
            self._resize(fitting)
        self.lengths = ends
        new = starts, tuple(counts)
        return Span(*new, width, self.window, device, self._size, sent_2b=extents_2b)

    def write(self, lane: str, span: Span, values_br: Tensor, *, heads: bool = False) -> None:
        """Store the new rows ``values_br`` (b, r, …) of one lane.

        heads: they are (b, r, h, d), to be attended to: the rows of a head are kept side by side,
        which attention over a batch reads up to four times as fast on a CPU. For all of a lane's
        life; such a lane has no ``rows``.
        """
        stored = self._lanes.get(lane)
        if stored is None:
            stored = self._lanes[lane] = _blank(values_br, len(self.lengths), self._size, heads)
        if span.start is not None:
            kept = min(span.width, self._size)
            place = (span.end - kept) % self._size
            if place + kept <= self._size:
                stored.narrow(1, place, kept).copy_(values_br[:, span.width - kept :])
                return
        slots = span.slots
        stored.index_put_((slots.batch_p, slots.places_p), slots.valid(values_br))

    def read(self, lane: str, span: Span) -> Tensor:
        """(b, t, …): the places of one lane that the rows of ``span`` see.

        Raises EngineError for those of a prompt of which the lane keeps the end alone: such rows
        see their own.
        """
        if span.from_start and max(span.counts) > self._size:
            raise EngineError(f"{max(span.counts)} first rows, of which {self._size} were kept")
        seen = span.seen
        return self._lanes[lane].narrow(1, seen.start, seen.stop - seen.start)

    def used(self, lane: str) -> Tensor:
        """(b, t, …): the places of one lane that were ever written."""
        lanes = self._lanes[lane]
        return lanes.narrow(1, 0, min(self._size, max(self.lengths)))

    def positions(self, device: torch.device, lengths_b: Tensor | None = None) -> Tensor:
        """(b, t): the position that each place of ``used`` stands for; below 0: for none.

        lengths_b: how many rows there are, if the device knows already.
        """
        places = torch.arange(min(self._size, max(self.lengths)), device=device)
        return ring_positions(self.last(device, lengths_b), places, self._size)

    def last(self, device: torch.device, lengths_b: Tensor | None = None) -> Tensor:
        """(b, 1): the position of the last row of each; ``lengths_b`` as for ``positions``."""
        if lengths_b is None:
            lengths_b = torch.tensor(self.lengths, device=device)
        return lengths_b[:, None] - 1

    def take(
        self, lane: str, firsts: Sequence[int], count: int, first_b: Tensor | None = None
    ) -> Tensor:
        """(b, count, …): the rows of one lane at positions ``firsts[b]`` and after it.

        What stands at positions that hold no row is of no meaning. first_b: these positions, if the
        device knows them already.
        """
        stored, size = self._lanes[lane], self._size
        first, alike = firsts[0], all(each == firsts[0] for each in firsts)
        if alike and first % size + count <= size:
            return stored.narrow(1, first % size, count)
        steps = torch.arange(count, device=stored.device)
        if alike:
            return stored.index_select(1, (steps + first) % size)
        if first_b is None:
            first_b = torch.tensor(firsts, device=stored.device)
        return take_rows(stored, (first_b[:, None] + steps) % size)

    def rows(self, lane: str) -> Tensor:
        """(b · t, …): one lane, batch row after batch row; see ``places``."""
        return self._seen_as(lane, "rows", lambda stored: stored.flatten(0, 1))

    def places(self, positions: Tensor) -> Tensor:
        """Where positions (b, …) lie in ``rows``."""
        wraps = max(self.lengths) > self._size
        return row_places(positions % self._size if wraps else positions, self._size)

    def heads(self, lane: str) -> Tensor | None:
        """(b, h, t, d): all places of a lane of heads, as it lies in memory; None: no such lane."""
        if lane not in self._lanes:
            return None
        return self._seen_as(lane, "heads", lambda stored: stored.transpose(1, 2))

    def _seen_as(self, lane: str, how: str, view: Callable[[Tensor], Tensor]) -> Tensor:
        """A view of a whole lane, made once: passes ask for all lanes again and again."""
        stored, found = self._lanes[lane], self._views.get((lane, how))
        if found is None or found[0] is not stored:
            found = self._views[lane, how] = stored, view(stored)
        return found[1]

    def has(self, lane: str) -> bool:
        """Whether anything was ever written to ``lane``."""
        return lane in self._lanes

    def _forget_views(self, lane: str) -> None:
        """Keep nothing that a lane lay in before."""
        for how in ("rows", "heads"):
            self._views.pop((lane, how), None)

    @property
    def nbytes(self) -> int:
        """Bytes of all lanes."""
        return sum(lane.untyped_storage().nbytes() for lane in self._lanes.values())

    def _fitting(self, lengths: Sequence[int]) -> int:
        """How many places lanes need that hold ``lengths`` rows, less what may be overwritten."""
        behind = self._behind
        if behind is None:
            return _power_of_two(max(lengths))
        needs = (n - max(s - behind, 0) for n, s in zip(lengths, self._settled, strict=True))
        ring, need = ring_size(behind), max(needs)
        return ring << (-(-need // ring) - 1).bit_length() if need > ring else ring

    def _resize(self, size: int) -> None:
        """Move what must be kept into lanes of ``size`` places."""
        before, self._size = self._size, size
        if not self._lanes:
            return
        behind = self._behind
        runs = [
            (b, 0 if behind is None else max(settled - behind, 0), length)
            for b, (settled, length) in enumerate(zip(self._settled, self.lengths, strict=True))
        ]
        device = next(iter(self._lanes.values())).device
        at: dict[str, Any] = {"device": device}
        rows = torch.cat([torch.full((end - first,), b, **at) for b, first, end in runs])
        kept = torch.cat([torch.arange(first, end, **at) for _, first, end in runs])
        for name, lane in self._lanes.items():
            moved = _blank(lane, len(runs), size, heads=_keeps_heads(lane))
            moved.index_put_((rows, kept % size), lane[rows, kept % before])
            self._lanes[name] = moved
            self._forget_views(name)


def _blank(like: Tensor, batch: int, size: int, heads: bool) -> Tensor:  # noqa: FBT001
    """A lane of zeros, (b, t, …), for values (b, r, …)."""
    if not heads:
        return like.new_zeros((batch, size, *like.shape[2:]))
    return like.new_zeros((batch, like.shape[2], size, like.shape[3])).transpose(1, 2)


def _keeps_heads(lane: Tensor) -> bool:
    """Whether the rows of a head lie side by side in a lane."""
    return not lane.is_contiguous()


def _chosen(lane: Tensor, rows: Tensor) -> Tensor:
    """The batch rows ``rows`` of a lane, which lie in memory as they did."""
    if not _keeps_heads(lane):
        return lane.index_select(0, rows)
    return lane.transpose(1, 2).index_select(0, rows).transpose(1, 2)


class LayerCache(RowCache, Generic[L]):
    """A cache that also keeps the ``layers`` that it serves, without their modules.

    They are of the weights as they are when it is made: a cache is for one generation. None: the
    modules have to be called. ends: likewise what stands before the layers and after them.
    """

    def __init__(
        self,
        layers: Sequence[L] | None,
        batch: int,
        window: int | None = None,
        keep: int = 0,
        ends: EndWeights | None = None,
    ) -> None:
        super().__init__(batch, window, keep)
        self.layers, self.ends = layers, ends
        self._kept: dict[Hashable, Any] = {}

    def kept(self, what: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gave on the first call, for the life of the cache."""
        if what not in self._kept:
            self._kept[what] = make()
        found: T = self._kept[what]
        return found


def lane_of(layer: int) -> str:
    """The lane of the keys and values of a layer, by its number."""
    return f"layer{layer}"


def ring_size(behind: int) -> int:
    """Places of a lane that keeps ``behind`` rows before the settled one, as a rule."""
    return -(-(behind + SLACK) // _STEP) * _STEP


def ring_positions(last_b1: Tensor, places_t: Tensor, size: int) -> Tensor:
    """(b, t): the position that each of some places of a ring of ``size`` stands for.

    last_b1: of the last row. Below 0: for none.
    """
    return last_b1 - (last_b1 - places_t) % size


def _power_of_two(rows: int) -> int:
    """The least power of two that holds ``rows``, and no fewer than a step."""
    return max(1 << max(rows - 1, 0).bit_length(), _STEP)
