"""Scores of many items, with intervals by the bootstrap.

A score is a function of sums over items (n-gram counts for BLEU, passes and tries for pass@1), so a
resample of the items is a vector of weights, and nothing is scored twice. Axes: n items, s
statistics, d draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import attrs
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Resamples of an interval, and the share of them that lies within it.
DRAWS = 1000
LEVEL = 0.95


@attrs.frozen
class Interval:
    """A value, and between what the middle LEVEL of its resamples lie; None where unknown."""

    value: float
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Of values that JSON can spell."""
        return attrs.asdict(self)


@runtime_checkable
class Figure(Protocol):
    """A score of a part."""

    @property
    def value(self) -> float:
        """Of all items."""
        ...

    def draws(self, seed: int) -> Floats | None:
        """(d,): of resamples of the items; None if they are not known."""
        ...


@attrs.frozen(eq=False)
class Summed:
    """A score that is a function of sums over items.

    stats_ns: statistics of each item. of: the score of their sums. Figures of as many items draw
    the same resamples from the same seed, so that their ratios are of pairs.
    """

    stats_ns: Floats
    of: Callable[[Floats], float]

    @property
    def value(self) -> float:
        """The score of all items."""
        return self.of(self.stats_ns.sum(0))

    def draws(self, seed: int) -> Floats | None:
        """(d,): the scores of resamples."""
        count = len(self.stats_ns)
        if not count:
            return None
        rng = np.random.default_rng((seed, count))
        weights_dn = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS)
        return np.array([self.of(sums) for sums in weights_dn @ self.stats_ns])


@attrs.frozen(eq=False)
class Resampled:
    """A score of items that is no function of sums. ``of`` gives it, anew for each draw."""

    items: Sequence[Any]
    of: Callable[[Sequence[Any]], float]

    @property
    def value(self) -> float:
        """The score of all items."""
        return float(self.of(self.items))

    def draws(self, seed: int) -> Floats | None:
        """(d,): the scores of a tenth as many resamples, since each is computed anew."""
        count = len(self.items)
        rng = np.random.default_rng((seed, count))
        chosen = (rng.integers(count, size=count) for _ in range(DRAWS // 10))
        return np.array([self.of([self.items[i] for i in picked]) for picked in chosen])


@attrs.frozen
class Given:
    """A score that comes with its standard error, or without one (None)."""

    value: float
    error: float | None = None

    def draws(self, seed: int) -> Floats | None:
        """(d,): as if it were normal."""
        if self.error is None:
            return None
        return np.random.default_rng(seed).normal(self.value, self.error, DRAWS)


def mean(values: Sequence[float]) -> Summed:
    """The mean of a number of each item."""
    stats = np.array([[value, 1.0] for value in values], dtype=np.float64).reshape(-1, 2)
    return Summed(stats, _ratio)


def ratio(parts: Sequence[float], of: Sequence[float], scale: float = 1.0) -> Summed:
    """``scale`` times the sum of ``parts`` by the sum of ``of``."""
    stats = np.column_stack((np.asarray(parts, float), np.asarray(of, float)))
    return Summed(stats, lambda sums: scale * _ratio(sums))


def _ratio(sums: Floats) -> float:
    return float(sums[0] / sums[1]) if sums[1] else float("nan")


def interval(figure: Figure, seed: int) -> Interval:
    """The value of a figure, and its interval."""
    return _of_draws(figure.value, figure.draws(seed))


def relative(figure: Figure, reference: Figure, seed: int) -> Interval | None:
    """The ratio of two figures of the same items, from the same resamples; None where it is none.

    Source: the paired bootstrap of Koehn, 2004.
    """
    if not reference.value:
        return None
    draws = None
    if type(figure) is type(reference) and not isinstance(figure, Given):
        ours, theirs = figure.draws(seed), reference.draws(seed)
        if ours is not None and theirs is not None and ours.shape == theirs.shape:
            drawn = theirs != 0
            draws = ours[drawn] / theirs[drawn]
    return _of_draws(figure.value / reference.value, draws)


def _of_draws(value: float, draws: Any) -> Interval:
    finite = draws[np.isfinite(draws)] if draws is not None else ()
    if not len(finite):
        return Interval(value, None, None)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(finite, [tail, 100 - tail])
    return Interval(value, float(low), float(high))
