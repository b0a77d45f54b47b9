"""How long each candidate takes to read a model's weights.

Decoding meets its weights in memory, not in a cache. So a candidate multiplies many distinct
weights, in all more bytes than the last-level cache holds, before the next one has its turn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from blt_core.kernels.candidates import KERNELS, ROW_CLASSES, Kernel, chosen_from
from blt_core.kernels.choice import Times
from blt_core.kernels.machine import last_level_cache
from blt_core.nn.linear import Multiply

#: How much of a cache is read in a turn of a candidate.
_EXCESS = 1.25
#: Rows of a weight, as many as kernels take at a time or more: cut weights are multiples of them.
_BLOCK = 64
#: Turns of each candidate, and how much slower than the best one it may be to have another.
_TURNS, _HOPELESS = 3, 1.5


def measure(
    weights: Mapping[str, Sequence[Tensor]],
    *,
    budget: float = math.inf,
    without_copies: Collection[str] = (),
    watch: Callable[[int, int], None] = lambda _done, _all: None,
) -> Times:
    """The least seconds a weight of each candidate, by weight and class of rows.

    weights: those of each name. budget: seconds; what is not measured to the end by then is left
    out. without_copies: weights for which kernels that make copies are no candidates. watch: called
    with the candidates that are done, and all.
    """
    until = time.perf_counter() + budget
    trials, found = _trials(weights, without_copies), dict[str, dict[str, dict[str, float]]]()
    total = sum(len(each) for each in trials.values())
    done = 0
    for rows_class, kernels in trials.items():
        times = _class_times(kernels, rows_class, weights, until, without_copies)
        for name, each in times.items():
            found.setdefault(name, {})[rows_class] = each
        done += len(kernels)
        watch(done, total)
        if time.perf_counter() > until:
            break
    return found


def spread(
    weights: Mapping[str, Sequence[Tensor]], *, cut: bool = False
) -> dict[str, list[Tensor]]:
    """Distinct weights of each name that together exceed the last-level cache.

    Copies are added where the model has too few, and some are left out where it has more. cut: of
    large weights the first rows alone are taken, so that there is time for all classes of rows.
    """
    share = _EXCESS * last_level_cache() / max(len(weights), 1)
    chosen = {}
    for name, own in weights.items():
        rows = max(math.ceil(share / own[0][0].nbytes / _BLOCK), 1) * _BLOCK
        if cut and rows < len(own[0]):
            chosen[name] = [own[0][:rows]]
            continue
        count = max(math.ceil(share / own[0].nbytes), 1)
        some = list(own[:count])
        chosen[name] = some + [some[0].clone() for _ in range(count - len(some))]
    return chosen


def _trials(
    weights: Mapping[str, Sequence[Tensor]], without_copies: Collection[str]
) -> dict[str, list[str]]:
    """The kernels that serve any of the weights, by class of rows."""
    return {
        rows_class: list(
            dict.fromkeys(
                kernel.name
                for name, own in weights.items()
                for kernel in _able(name, own, rows, without_copies)
            )
        )
        for rows_class, rows in ROW_CLASSES.items()
    }


@attrs.frozen(eq=False)
class _Trial:
    """A kernel that multiplies ``x`` by all weights of a name."""

    name: str
    kernel: str
    x: Tensor
    products: Sequence[Multiply]

    def seconds(self) -> float:
        """Of one weight."""
        began = time.perf_counter()
        for multiply in self.products:
            multiply(self.x)
        return (time.perf_counter() - began) / len(self.products)


@torch.inference_mode()
def _class_times(
    kernels: Sequence[str],
    rows_class: str,
    weights: Mapping[str, Sequence[Tensor]],
    until: float,
    without_copies: Collection[str],
) -> dict[str, dict[str, float]]:
    rows = ROW_CLASSES[rows_class]
    best: dict[str, dict[str, float]] = {name: {} for name in weights}
    able = {name: _able(name, own, rows, without_copies) for name, own in weights.items()}
    trials: dict[tuple[str, str], _Trial] = {}
    for turn in range(_TURNS):
        for kernel in kernels:
            # All of a kernel first: what was just prepared, and called once, is in the cache.
            for name, own in weights.items():
                if turn or time.perf_counter() > until:
                    break
                if KERNELS[kernel] in able[name]:
                    trials[kernel, name] = _trial(KERNELS[kernel], name, own, rows)
            for name in weights:
                if time.perf_counter() > until:
                    return _whole(best, able) if turn == 0 else best
                trial = trials.get((kernel, name))
                least = min(best[name].values(), default=math.inf)
                if trial is None or best[name].get(kernel, 0.0) > _HOPELESS * least:
                    continue
                best[name][kernel] = min(trial.seconds(), best[name].get(kernel, math.inf))
    return best


def _able(
    name: str, own: Sequence[Tensor], rows: int, without_copies: Collection[str]
) -> list[Kernel]:
    """The candidates for a weight."""
    serving = chosen_from(own[0], rows)
    return [each for each in serving if not (each.copies and name in without_copies)]


def _trial(kernel: Kernel, name: str, own: Sequence[Tensor], rows: int) -> _Trial:
    x = torch.randn(rows, own[0].shape[1]).to(own[0].dtype)
    trial = _Trial(name, kernel.name, x, [kernel.prepare(weight) for weight in own])
    trial.products[0](x)  # the first call of a kernel makes what it needs
    return trial


def _whole(
    best: Mapping[str, dict[str, float]], able: Mapping[str, Sequence[Kernel]]
) -> dict[str, dict[str, float]]:
    """Those of the weights that every candidate has met."""
    return {name: times for name, times in best.items() if len(times) == len(able[name])}
