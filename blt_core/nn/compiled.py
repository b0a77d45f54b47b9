"""Passes over a cache as compiled functions: what ``[run] compile`` runs in place of bare layers.

Decoding asks for passes of one row, or of as many as a draft has, again and again. Such a pass is a
pure function of weights, of its rows and their positions, and of lanes that keep their shape; so
``torch.compile`` can make one program of it, in which no Python runs between products. A part
writes what is to be compiled as a function of tensors and bare layers, and calls it by a
:class:`CompiledPass`.

Axes: b batch rows, r new rows, t places of a lane, g key/value heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from blt_core.log import logger
from blt_core.nn.cache import RowCache, Span, lane_of

P = ParamSpec("P")
R = TypeVar("R")

#: Most layers of one compiled function; a deeper stack is several calls of the same.
_MOST_LAYERS = 8
#: Stacks are not cut into shorter runs than these, to be cut evenly.
_LEAST_LAYERS = 4


class StaticSpan:
    """What bare layers ask of a :class:`Span`, of tensors alone.

    positions_br: of the new rows. size: t. dtype: of the queries.
    """

    packing: None = None
    from_start = False

    def __init__(
        self, positions_br: Tensor, window: int | None, size: int, dtype: torch.dtype
    ) -> None:
        self.window = window
        self.places_br = positions_br % size
        behind = positions_br[..., None] - torch.arange(size, device=positions_br.device)
        behind = behind % size
        # A place behind by more than the position would stand for one below 0.
        visible = behind <= positions_br[..., None]
        visible = visible if window is None else visible & (behind < window)
        zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        self._bias = zeros.masked_fill(~visible, float("-inf"))[:, None]

    def bias(self, _: torch.dtype) -> Tensor:
        """(b, 1, r, t): 0 where a row sees a place, -inf elsewhere."""
        return self._bias


class StaticCache:
    """What bare layers ask of a :class:`RowCache`: lanes (b, 2g, t, d), written in place."""

    def __init__(self, lanes: Sequence[Tensor]) -> None:
        self._lanes = {lane_of(index): lane for index, lane in enumerate(lanes)}

    def write(self, lane: str, span: StaticSpan, values_br: Tensor, *, heads: bool = True) -> None:
        """Store new rows (b, r, 2g, d) of a lane; heads: as all lanes here are."""
        batch = torch.arange(values_br.shape[0], device=values_br.device)[:, None]
        self._lanes[lane].transpose(1, 2)[batch, span.places_br] = values_br

    def read(self, lane: str, _: StaticSpan) -> Tensor:
        """(b, t, 2g, d): all places of a lane."""
        return self._lanes[lane].transpose(1, 2)


class StaticRows(NamedTuple):
    """What a cache gives to a compiled pass over its rows.

    positions_br: of the new rows; angles: (b, r, 1, d/2, 2), pairs of real numbers, for compilers
    know no others; lanes: (b, 2g, t, d) of each layer; window: of the cache.
    """

    positions_br: Tensor
    angles: Tensor
    lanes: list[Tensor]
    window: int | None

    @classmethod
    def of(cls, span: Span, angles: Tensor, cache: RowCache, layers: int) -> StaticRows | None:
        """Those of a pass; None where its rows need more: padding, or keys of their own alone."""
        batch = len(span.counts)
        if span.from_start or any(count != span.width for count in span.counts):
            return None
        lanes = [cache.heads(lane_of(index)) for index in range(layers)]
        kept = [lane for lane in lanes if lane is not None]
        if len(kept) < layers:
            return None
        positions_br = whole(span.positions_br.expand(batch, -1))
        angles = whole(torch.view_as_real(angles).expand(batch, -1, -1, -1, -1))
        return cls(positions_br, angles, kept, span.window)

    def of_layers(self, piece: slice) -> StaticRows:
        """The same for some of the layers."""
        return self._replace(lanes=self.lanes[piece])

    def open(self, dtype: torch.dtype) -> tuple[StaticSpan, StaticCache]:
        """What bare layers are called with, for rows of ``dtype``; within a compiled function."""
        size = self.lanes[0].shape[2]
        return StaticSpan(self.positions_br, self.window, size, dtype), StaticCache(self.lanes)

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What is fixed in a function that is compiled for such rows."""
        return tuple(size > 1 for size in self.positions_br.shape), self.lanes[0].dtype


def whole(rows: Tensor) -> Tensor:
    """The same, not as a view of others: how a view lies would be part of what is compiled."""
    kept = (
        rows
        if rows.is_contiguous() and not rows.storage_offset()
        else rows.clone(memory_format=torch.contiguous_format)
    )
    return kept.view(-1).view(kept.shape)  # an axis of one row may have any stride


class CompiledPass(Generic[P, R]):
    """A function of tensors, compiled whole on its first call of each kind.

    name: of what it computes, for the log. Raises on a call what the compiler raises.
    """

    def __init__(self, name: str, function: Callable[P, R]) -> None:
        self._name, self._function = name, function
        self._compiled: dict[Hashable, Callable[P, R]] = {}

    def __reduce__(self) -> tuple[type[CompiledPass[P, R]], tuple[str, Callable[P, R]]]:
        """What was compiled stays in its process."""
        return type(self), (self._name, self._function)

    def of(
        self,
        kind: Hashable,
        rows: StaticRows,
        of_rows: Sequence[Tensor],
        growing: Sequence[Tensor] = (),
    ) -> Callable[P, R]:
        """The function for calls of one kind.

        A kind says all that is not in the shapes of rows and lanes, weights among it, and which
        lengths are 1. Other calls may have other batches, other numbers of rows in ``of_rows``
        (b, r, …), and other lengths of lanes and of ``growing`` (t, …).
        """
        key = kind, torch.get_num_threads(), torch.is_inference_mode_enabled()
        return self._compiled.get(key) or self._first(key, rows, of_rows, growing)

    def _first(
        self,
        key: Hashable,
        rows: StaticRows,
        of_rows: Sequence[Tensor],
        growing: Sequence[Tensor],
    ) -> Callable[P, R]:
        """A function that compiles, and is kept once that has gone well."""
        logger().info("a pass is compiled", part=self._name)
        for tensor in (rows.positions_br, rows.angles, *of_rows):
            _vary(tensor, *(axis for axis in (0, 1) if tensor.shape[axis] > 1))
        for lane in rows.lanes:
            _vary(lane, 2, *((0,) if len(lane) > 1 else ()))
        for tensor in growing:
            _vary(tensor, 0)
        run = compiled(self._function)

        def first(*args: P.args, **kwargs: P.kwargs) -> R:
            result = run(*args, **kwargs)
            self._compiled[key] = run
            return result

        return first


def _vary(tensor: Tensor, *axes: int) -> None:
    """Have the compiler leave the lengths of some axes open."""
    for axis in axes:
        torch._dynamo.maybe_mark_dynamic(tensor, axis)  # noqa: SLF001 -- its documented name


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """A function compiled whole on its first call; what it was compiled for before is its own."""
    # The compiler keeps what it makes with the code of a function.
    code = cast("FunctionType", function)
    own = FunctionType(
        code.__code__.replace(),
        code.__globals__,
        code.__name__,
        code.__defaults__,
        code.__closure__,
    )
    run: Callable[P, R] = torch.compile(
        own,
        fullgraph=True,
        dynamic=False,
        options={"cpp_wrapper": True, "guard_filter_fn": _may_change},
    )
    return run


def _may_change(guards: Sequence[Any]) -> list[bool]:
    """Which of the compiler's assumptions are looked at again before each call.

    Not those about code, nor about how layers are made: a kind stands for these.
    """
    return [not guard.is_global and "layers" not in guard.name for guard in guards]


def pieces(count: int) -> list[slice]:
    """``count`` layers in runs, alike in length if that goes: for each a function is called."""
    fitting = [n for n in range(_MOST_LAYERS, _LEAST_LAYERS - 1, -1) if count % n == 0]
    size = fitting[0] if fitting and count > _MOST_LAYERS else _MOST_LAYERS
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]
