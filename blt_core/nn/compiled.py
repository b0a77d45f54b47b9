"""Passes over a cache as compiled functions: what ``[run] compile`` runs in place of bare layers.

Decoding asks for passes of one row, or of as many as a draft has, again and again. Such a pass is a
pure function of weights, of its rows and their positions, and of lanes that keep their shape; so a
compiler can make one program of it, in which no Python runs. A part writes what is to be compiled
as a function of tensors and bare layers, and calls it by a :class:`CompiledPass`. Who compiles is
none of its business: see :mod:`blt_core.compiling`.

Axes: b batch rows, r new rows, t places of a lane, n positions, g key/value heads, d width of a
head.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import attrs
import torch
from torch import Tensor

from blt_core.nn.attention import real_angles
from blt_core.nn.bare import EndWeights
from blt_core.nn.blocks import BlockLanes, BlockSpan
from blt_core.nn.cache import Lanes, RowCache, Span, lane_of, ring_positions
from blt_core.nn.linear import kernels_of
from blt_core.types import Blocks

L = TypeVar("L")
W = TypeVar("W")

#: Most layers of one compiled function; a deeper stack is several, and those amid it are the same.
_MOST_LAYERS = 8
#: Stacks are not cut into shorter runs than these, to be cut evenly.
_LEAST_LAYERS = 4


class StaticSpan:
    """What bare layers ask of a :class:`Span`, of tensors alone.

    rows: of the cache. dtype: of the queries.
    """

    packing: None = None
    from_start = False

    def __init__(self, rows: StaticRows, dtype: torch.dtype) -> None:
        positions_br, size = rows.positions_br, rows.size
        self.window = window = rows.window
        self.places_br = positions_br % size
        behind = (positions_br[..., None] - rows.used_t) % size
        # A place behind by more than the position would stand for one below 0.
        visible = behind <= positions_br[..., None]
        visible = visible if window is None else visible & (behind < window)
        zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        self._bias = zeros.masked_fill(~visible, float("-inf"))[:, None]

    def bias(self, _: torch.dtype) -> Tensor:
        """(b, 1, r, t): 0 where a row sees a place, -inf elsewhere."""
        return self._bias


class StaticCache:
    """What bare layers ask of a :class:`RowCache`: lanes, of which the first ``used`` places."""

    def __init__(self, lanes: Sequence[Tensor], used: int) -> None:
        """lanes: (b, 2g, t, d), written in place."""
        torch._check(used <= lanes[0].shape[2])  # noqa: SLF001 -- for compilers, which know no more
        self._lanes = {lane_of(index): lane for index, lane in enumerate(lanes)}
        self._used = used

    def write(self, lane: str, span: StaticSpan, values_br: Tensor, *, heads: bool = True) -> None:
        """Store new rows (b, r, 2g, d) of a lane; heads: as all lanes here are."""
        batch = torch.arange(values_br.shape[0], device=values_br.device)[:, None]
        self._lanes[lane].transpose(1, 2)[batch, span.places_br] = values_br

    def read(self, lane: str, _: StaticSpan) -> Tensor:
        """(b, t, 2g, d): the used places of a lane."""
        return self.lane(lane)

    def lane(self, lane: str) -> Tensor:
        """(b, t, 2g, d): the used places of a lane."""
        return self._lanes[lane].narrow(2, 0, self._used).transpose(1, 2)


class StaticRows(NamedTuple):
    """What a cache gives to a compiled pass over its rows, or over a block beside them.

    positions_br: of the new rows; table: angles of positions, (n, 1, d/2, 2), pairs of real
    numbers, for compilers know no others; lanes: (b, 2g, t, d) of each layer; used_t: numbers of
    the places in them that are written, from 0 on; window: of the cache.
    last_b1: of a block, which leaves the lanes as they are: the position of the last row in them.
    """

    positions_br: Tensor
    table: Tensor
    lanes: Sequence[Tensor]
    used_t: Tensor
    window: int | None
    last_b1: Tensor | None = None

    @classmethod
    def of(
        cls, span: Span, cache: RowCache, layers: int, head_dim: int, theta: float
    ) -> StaticRows | None:
        """Those of a pass; None where its rows need more: padding, or keys of their own alone."""
        if span.from_start or any(count != span.width for count in span.counts):
            return None
        lanes = _lanes(cache, layers)
        if lanes is None:
            return None
        return cls(
            span.positions_br.expand(len(span.starts), -1).contiguous(),
            real_angles(span.end, head_dim, theta, span.device),
            lanes,
            _used(cache, span.end, span.device),
            span.window,
        )

    @classmethod
    def of_blocks(
        cls, blocks: Blocks, cache: RowCache, layers: int, head_dim: int, theta: float
    ) -> StaticRows | None:
        """Those of one masked block of each batch row; None where more are asked for."""
        device, (_, count, size) = blocks.start_bn.device, blocks.ids_bnB.shape
        lanes = _lanes(cache, layers)
        if count > 1 or blocks.causal_bn is not None or lanes is None or not any(cache.lengths):
            return None
        return cls(
            blocks.start_bn + torch.arange(size, device=device),
            real_angles(max(cache.lengths) + size, head_dim, theta, device),
            lanes,
            _used(cache, max(cache.lengths), device),
            cache.window,
            cache.last(device, blocks.cached_b),
        )

    def of_layers(self, piece: slice) -> StaticRows:
        """The same for some of the layers."""
        return self._replace(lanes=self.lanes[piece])

    @property
    def tensors(self) -> list[Tensor]:
        """All of it that differs from call to call."""
        last = [] if self.last_b1 is None else [self.last_b1]
        return [self.positions_br, self.table, *self.lanes, self.used_t, *last]

    def around(self, tensors: Iterator[Tensor]) -> StaticRows:
        """The same of other ``tensors``."""
        return self._replace(
            positions_br=next(tensors),
            table=next(tensors),
            lanes=[next(tensors) for _ in self.lanes],
            used_t=next(tensors),
            last_b1=None if self.last_b1 is None else next(tensors),
        )

    @property
    def standing(self) -> list[bool]:
        """Which of ``tensors`` lie where they are while a text grows."""
        last = [] if self.last_b1 is None else [False]
        return [False, True, *[True] * len(self.lanes), True, *last]

    @property
    def with_all_places(self) -> StaticRows:
        """The same with all places of the lanes: a row sees none that is not written."""
        return self._replace(used_t=_counted(self.size, self.used_t.device))

    @property
    def as_example(self) -> StaticRows:
        """The same for a compiler: one that sees all places used would take that for a rule."""
        full = len(self.used_t) == self.size
        return self._replace(used_t=self.used_t[:-1]) if full else self

    @property
    def size(self) -> int:
        """Places of a lane."""
        return self.lanes[0].shape[2]

    @property
    def angles(self) -> Tensor:
        """(b, r, 1, d/2, 2); within a compiled function."""
        return self.table[self.positions_br]

    def open(self, dtype: torch.dtype) -> tuple[StaticSpan | BlockSpan, Lanes[Any]]:
        """What bare layers are called with, for rows of ``dtype``; within a compiled function."""
        cache = StaticCache(self.lanes, self.used_t.shape[0])
        if self.last_b1 is None:
            return StaticSpan(self, dtype), cache
        start_b1, width = self.positions_br[:, :1], self.positions_br.shape[1]
        keys_bt = ring_positions(self.last_b1, self.used_t, self.size)
        return BlockSpan(start_b1, keys_bt, width, self.window, dtype), BlockLanes(cache.lane)

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What is fixed in a function that is compiled for such rows."""
        several = tuple(size > 1 for size in (*self.positions_br.shape, len(self.used_t)))
        return several, self.lanes[0].dtype, self.window, self.last_b1 is not None


def _used(cache: RowCache, end: int, device: torch.device) -> Tensor:
    """The places that are written once positions below ``end`` are."""
    return _counted(cache.size, device)[:end]


@functools.lru_cache(maxsize=64)
def _counted(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.arange(count, device=device)


def _lanes(cache: RowCache, layers: int) -> list[Tensor] | None:
    """(b, 2g, t, d) of each layer; None where one has none yet."""
    lanes = [cache.heads(lane_of(index)) for index in range(layers)]
    kept = [lane for lane in lanes if lane is not None]
    return kept if len(kept) == layers else None


@attrs.frozen(eq=False)
class Weights(Generic[W]):
    """What a pass computes with, whichever rows it is called for.

    value: weights and sizes, in sequences and attrs classes. tensors: all weights in it. made: what
    it is made of, in words: kinds, sizes, and how its weights lie in memory.
    """

    value: W
    tensors: list[Tensor]
    made: str

    @classmethod
    def of(cls, value: W) -> Weights[W]:
        """Those of a value."""
        tensors: list[Tensor] = []
        _collect(value, tensors)
        return cls(value, tensors, _told(value))

    def around(self, tensors: Iterator[Tensor]) -> W:
        """The value with other weights, in the order of ``tensors``."""
        changed: W = _replaced(self.value, tensors)
        return changed


@attrs.frozen(eq=False)
class StackWeights(Generic[L]):
    """Some layers of a stack, and what stands at its ends, where they are the first or the last.

    embed: of ids (None: rows are given). norm, head: to logits (None: rows are what is asked for).
    """

    layers: Sequence[L]
    embed: Tensor | None = None
    norm: Tensor | None = None
    head: Tensor | None = None


def stack_weights(
    layers: Sequence[L], ends: EndWeights | None
) -> list[tuple[slice, Weights[StackWeights[L]]]]:
    """Which layers are compiled as one function, and with which weights it is called."""
    cut = _pieces(len(layers))
    values = [StackWeights(layers[piece]) for piece in cut]
    if ends is not None:
        values[0] = attrs.evolve(values[0], embed=ends.embed)
        values[-1] = attrs.evolve(values[-1], norm=ends.norm, head=ends.head)
    return [(piece, Weights.of(value)) for piece, value in zip(cut, values, strict=True)]


def _collect(value: object, into: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        into.append(value)
    for each in _inside(value):
        _collect(each, into)


def _inside(value: Any) -> Sequence[Any]:
    """What a sequence or an attrs object holds."""
    if isinstance(value, (list, tuple)):
        return value
    if attrs.has(type(value)):
        return [getattr(value, field.name) for field in attrs.fields(type(value))]
    return ()


def _told(value: Any) -> str:
    """What a value is made of, and which operators multiply by a weight in it."""
    if isinstance(value, Tensor):
        lies = f"{value.dtype} {value.device.type} {tuple(value.shape)} {value.stride()}"
        kernels = kernels_of(value)
        return lies if kernels is None else f"{lies} {kernels.compiled}"
    kind = type(value)
    if isinstance(value, (list, tuple)) or attrs.has(kind):
        return f"{kind.__module__}.{kind.__qualname__}({', '.join(map(_told, _inside(value)))})"
    return repr(value)


def _replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        other = next(tensors)
        if (kernels := kernels_of(value)) is not None:
            other.kernels = kernels  # type: ignore[attr-defined]
        return other
    kind: Any = type(value)
    if isinstance(value, (list, tuple)):
        return kind(_replaced(each, tensors) for each in value)
    if attrs.has(kind):
        return kind(*(_replaced(each, tensors) for each in _inside(value)))
    return value


class Sizes(NamedTuple):
    """Tensors of a call, and which of their axes have other lengths in others, by their names.

    Axes of one name are of one length, which is 2 at least.
    """

    tensors: list[Tensor]
    open_axes: list[Mapping[int, str]]


@attrs.frozen(eq=False)
class Program:
    """What a compiler is given: a function of tensors, and a call of it.

    name: of what it computes. function: from the example's tensors to tensors. example: a call.
    told: everything that is fixed in it, in words, but for the source of these ``modules``.
    standing: which tensors lie where they are while a text grows: lanes, weights, tables.
    """

    name: str
    function: Callable[..., Sequence[Tensor]]
    example: Sizes
    told: str
    modules: tuple[str, ...]
    standing: tuple[bool, ...]


#: What gives the results of a program for a list of tensors.
Compiled = Callable[[list[Tensor]], Sequence[Tensor]]


class Compiler(Protocol):
    """Makes a program that can be called, or raises what went wrong.

    With an attribute ``keeps_shapes`` that is true, programs are called with lanes of which all
    places count as written: so shapes differ less from call to call, and more is computed.
    """

    def __call__(self, program: Program, /) -> Compiled:
        """What runs the program."""


class CompiledPass(Generic[W]):
    """``function(rows, inputs, growing, weights)``, compiled whole on its first call of each kind.

    It gives a sequence of tensors. name: of what it computes, for the log.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[StaticRows, Sequence[Tensor], Sequence[Tensor], W], Sequence[Tensor]],
    ) -> None:
        self._name, self._function = name, function
        self._compiled: dict[Hashable, Compiled] = {}

    def __reduce__(self) -> tuple[type[CompiledPass[W]], tuple[str, Callable[..., Any]]]:
        """What was compiled stays in its process."""
        return type(self), (self._name, self._function)

    def __call__(
        self,
        compiler: Compiler,
        rows: StaticRows,
        inputs: Sequence[Tensor],
        weights: Weights[W],
        growing: Sequence[Tensor] = (),
    ) -> Sequence[Tensor]:
        """The function's results.

        Calls of one kind may differ in their batch, in the rows of ``inputs`` (b, r, …), and in the
        lengths of lanes, of the table of angles, and of ``growing`` (t, …), all of one length; and
        in which of these are 1, which makes another kind. Raises what the compiler raises.
        """
        if getattr(compiler, "keeps_shapes", False):
            rows = rows.with_all_places
        given = [*map(_whole, inputs), *growing, *weights.tensors]
        dtypes = tuple(each.dtype for each in inputs)
        several = tuple(len(each) > 1 for each in growing)
        key = rows.kind, weights.made, dtypes, several, torch.get_num_threads()
        run = self._compiled.get(key)
        if run is None:
            counts = len(inputs), len(growing)
            axes = _open_axes(rows, *counts, given[len(inputs) :])
            example = Sizes([*rows.as_example.tensors, *given], axes)
            run = compiler(
                Program(
                    self._name if rows.last_b1 is None else f"{self._name}-blocks",
                    self._flat(rows, weights, counts),
                    example,
                    repr(key),
                    (self._function.__module__, *_modules(weights.value)),
                    (*rows.standing, *[False] * len(inputs), *[True] * len(given[len(inputs) :])),
                )
            )
            self._compiled[key] = run
        return run([*rows.tensors, *given])

    def _flat(
        self, rows: StaticRows, weights: Weights[W], counts: tuple[int, int]
    ) -> Callable[..., Sequence[Tensor]]:
        """The function of tensors alone, in the order of a call."""
        inputs, growing = counts
        function = self._function

        def flat(*tensors: Tensor) -> Sequence[Tensor]:
            rest = iter(tensors)
            return function(
                rows.around(rest),
                [*itertools.islice(rest, inputs)],
                [*itertools.islice(rest, growing)],
                weights.around(rest),
            )

        return flat


def _open_axes(
    rows: StaticRows, inputs: int, growing: int, rest: Sequence[Tensor]
) -> list[Mapping[int, str]]:
    """Which axes have other lengths in other calls, tensor by tensor.

    rest: what comes after the inputs, of which the first ``growing`` may grow.
    """
    batch = {0: "batch"} if rows.positions_br.shape[0] > 1 else {}
    width = {1: "rows"} if rows.positions_br.shape[1] > 1 else {}
    return [
        *({**batch, **width}, {0: "angles"}, *[{**batch, 2: "places"}] * len(rows.lanes)),
        {0: "used"} if len(rows.used_t) > 1 else {},
        *[batch] * (rows.last_b1 is not None),
        *[{**batch, **width}] * inputs,
        *({0: "grown"} if len(tensor) > 1 else {} for tensor in rest[:growing]),
        *[dict[int, str]()] * len(rest[growing:]),
    ]


def _modules(value: object) -> list[str]:
    """Where the classes of a value are written."""
    if isinstance(value, Tensor):
        return []
    inside = [name for each in _inside(value) for name in _modules(each)]
    return sorted({type(value).__module__, *inside}) if attrs.has(type(value)) else inside


def _whole(rows: Tensor) -> Tensor:
    """The same, not as a view of others: how a view lies would be part of what is compiled."""
    kept = (
        rows
        if rows.is_contiguous() and not rows.storage_offset()
        else rows.clone(memory_format=torch.contiguous_format)
    )
    return kept.view(-1).view(kept.shape)  # an axis of one row may have any stride


def _pieces(count: int) -> list[slice]:
    """``count`` layers in runs, alike in length if that goes: for each a function is called."""
    fitting = [n for n in range(_MOST_LAYERS, _LEAST_LAYERS - 1, -1) if count % n == 0]
    size = fitting[0] if fitting and count > _MOST_LAYERS else _MOST_LAYERS
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]
