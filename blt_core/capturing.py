"""Captured passes: on CUDA a compiled pass is recorded as a graph, and replayed from then on.

A graph reads and writes the very addresses that it was recorded with. Lanes, weights and tables lie
where they are while a text grows, and are part of what a graph is recorded for; positions and new
rows are copied to where it reads them. Lanes are taken whole, with the places that are not written
yet: which of them a row sees is computed from its position, so a graph serves each byte.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import ClassVar, NamedTuple

import attrs
import torch
from torch import Tensor

from blt_core.log import logger
from blt_core.nn import Compiled, Compiler, Program

#: Graphs of one program that are kept; those that were not asked for the longest go first.
_MOST = 64
#: Held while one captures: CUDA captures one graph at a time.
_CAPTURING = threading.Lock()


class Recording(NamedTuple):
    """What was recorded: ``replay`` computes it anew, into ``results``."""

    results: Sequence[Tensor]
    replay: Callable[[], object]


#: Records what a function does. Raises RuntimeError where something in it cannot be recorded.
Recorder = Callable[[Callable[[], Sequence[Tensor]]], Recording]


@attrs.frozen
class CapturingCompiler:
    """A compiler whose programs are recorded when they are called for the same tensors again.

    What ``record`` records may share memory, so threads take turns at all programs.
    """

    keeps_shapes: ClassVar[bool] = True

    compiler: Compiler
    record: Recorder
    _turn: threading.Lock = attrs.field(init=False, factory=threading.Lock)

    def __call__(self, program: Program) -> Compiled:
        """The program of the inner compiler, to be recorded."""
        return CapturedPass(self.compiler(program), program.standing, self.record, self._turn)


class CapturedPass:
    """A program that is recorded for the tensors that it meets a second time, call after call.

    standing: whether a tensor lies where it is from call to call; others are copied. Where nothing
    can be recorded a warning is logged once, and the program itself runs. turn: held by the thread
    that runs one of those that share memory.
    """

    def __init__(
        self, run: Compiled, standing: Sequence[bool], record: Recorder, turn: threading.Lock
    ) -> None:
        self._run, self._standing, self._record = run, standing, record
        self._turn = turn
        # None: was met once. So what is met once alone, as a draft of a rare length, costs nothing.
        self._kept: OrderedDict[Hashable, _Captured | None] = OrderedDict()
        self._gave_up = False

    def __call__(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        """The program's results, which later calls leave as they are."""
        with self._turn:
            captured = None if self._gave_up else self._captured(tensors)
            return self._run(tensors) if captured is None else captured(tensors)

    def _captured(self, tensors: list[Tensor]) -> _Captured | None:
        """What was recorded for these tensors, now or before; None: they are met first."""
        key = tuple(
            (tensor.data_ptr(), tensor.shape, tensor.stride()) if stands else tensor.shape
            for tensor, stands in zip(tensors, self._standing, strict=True)
        )
        captured = self._kept.get(key)
        if captured is None and key in self._kept:
            try:
                captured = _Captured.of(self._run, tensors, self._standing, self._record)
            except RuntimeError as error:
                logger().warning("a pass cannot be captured; it is launched", reason=str(error))
                self._gave_up = True
                self._kept.clear()
                return None
        self._kept[key] = captured
        self._kept.move_to_end(key)
        if len(self._kept) > _MOST:
            self._kept.popitem(last=False)
        return captured


@attrs.frozen(eq=False)
class _Captured:
    """A recording, and where it reads those tensors that are copied (None: others)."""

    read: Sequence[Tensor | None]
    recording: Recording

    @classmethod
    def of(
        cls, run: Compiled, tensors: Sequence[Tensor], standing: Sequence[bool], record: Recorder
    ) -> _Captured:
        with torch.inference_mode(mode=False), torch.no_grad():
            read = [
                None if stands else tensor.clone()
                for tensor, stands in zip(tensors, standing, strict=True)
            ]
        given = [
            tensor if copied is None else copied
            for tensor, copied in zip(tensors, read, strict=True)
        ]
        return cls(read, record(lambda: run(given)))

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        for copied, tensor in zip(self.read, tensors, strict=True):
            if copied is not None:
                copied.copy_(tensor)
        self.recording.replay()
        return [result.clone() for result in self.recording.results]


def record_on(device: torch.device) -> Recorder:
    """Records graphs of a CUDA device, which share memory for what is computed on the way.

    They may: none runs beside another, and what one gives is copied before the next one runs.
    """
    first: torch.cuda.CUDAGraph | None = None  # kept: a pool without a graph cannot be used again
    side: torch.cuda.Stream | None = None

    def record(run: Callable[[], Sequence[Tensor]]) -> Recording:
        nonlocal first, side
        with _CAPTURING, torch.cuda.stream(torch.cuda.current_stream(device)):  # also if it fails
            graph, side = torch.cuda.CUDAGraph(), side or torch.cuda.Stream(device)
            pool = None if first is None else first.pool()
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"):
                results = run()
            first = first or graph
        return Recording(results, graph.replay)

    return record
