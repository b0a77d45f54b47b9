"""What most often followed each n-gram of given texts: a tree of contexts, read backwards.

A node stands for an n-gram; its children are the n-grams of one id more, before it. One that
occurred once has no children: what followed it is known. Sorted keys of parent and id hold the
tree, so a step down is a bisection, and all is made by sorting, a level at a time.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from blt_plugins.drafting.suffixes import Match

Ints = npt.NDArray[np.int64]

#: Between two texts: an id that none has, which is no part of an n-gram and follows none.
_BETWEEN = 0xFFFF
#: Bits of an id, and of a place in the texts.
_ID, _PLACE = 16, 32


class _Level(NamedTuple):
    """Nodes of equally long n-grams, by ``keys``, and the places that their children are made of.

    place: where what followed most often stands, the most recent of it. alone: whether nothing
    else was there. places, parents: where ids follow n-grams that occurred more than once, and
    which of the nodes these are.
    """

    keys: Ints
    place: Ints
    alone: npt.NDArray[np.bool_]
    places: Ints
    parents: Ints


class Continuations:
    """All n-grams of ``texts`` with up to ``most`` ids that something follows; read only."""

    def __init__(self, texts: Iterable[Sequence[int]], least: int, most: int) -> None:
        self._least, self._most = least, most
        ids = [np.append(np.asarray(text, np.int64), _BETWEEN) for text in texts]
        text = np.concatenate([np.zeros(0, np.int64), *ids])
        self._text, self._keys = array("H", text.astype(np.uint16)), array("q")
        self._place, self._alone = array("q"), bytearray()
        places = np.flatnonzero(text != _BETWEEN)
        parents = np.zeros_like(places)
        for size in range(1, most + 1):
            level = _level(text, size, places, parents)
            if not len(level.keys):
                break
            places, parents = level.places, level.parents + len(self._keys) + 1
            self._keys.frombytes(level.keys.tobytes())
            self._place.frombytes(level.place.tobytes())
            self._alone += level.alone.tobytes()

    def longest(self, ids: Sequence[int]) -> Match | None:
        """The longest end of ``ids`` that stands in the texts, and where its continuation does.

        That is the id that most often followed, where it did so last. None for matches that are
        shorter than the least.
        """
        return self._find(ids)[0]

    def after(self, ids: Sequence[int], count: int) -> list[int]:
        """At most ``count`` ids, each what most often followed the longest match before it."""
        found: list[int] = []
        context = list(ids[-self._most :])
        while len(found) < count:
            match, alone = self._find(context)
            if match is None:
                break
            # What stood once goes on as it did there; else the next id decides anew.
            new = self._text[match.end : match.end + (count - len(found) if alone else 1)].tolist()
            whole = _BETWEEN not in new
            new = new if whole else new[: new.index(_BETWEEN)]
            found += new
            context = (context + new)[-self._most :]
            if not whole:
                break
        return found

    def _find(self, ids: Sequence[int]) -> tuple[Match | None, bool]:
        """The match of ``longest``, and whether its n-gram stands nowhere else."""
        node, size, most = 0, 0, min(self._most, len(ids))
        while size < most and not (node and self._alone[node - 1]):
            child = self._child(node, ids[-size - 1])
            if child is None:
                break
            node, size = child, size + 1
        if not node:
            return None, False
        end, alone = self._place[node - 1], bool(self._alone[node - 1])
        while alone and size < min(most, end) and self._text[end - size - 1] == ids[-size - 1]:
            size += 1
        return (Match(size, end) if size >= self._least else None), alone

    def _child(self, node: int, token: int) -> int | None:
        key = node << _ID | token
        at = bisect_left(self._keys, key)
        return at + 1 if at < len(self._keys) and self._keys[at] == key else None


def _level(text: Ints, size: int, places: Ints, parents: Ints) -> _Level:
    """The nodes of n-grams with ``size`` ids, each before one of ``places``, under ``parents``."""
    fits = places >= size
    places, parents = places[fits], parents[fits]
    before = text[places - size]
    inside = before != _BETWEEN
    places, parents, before = places[inside], parents[inside], before[inside]
    sorting = (parents << 2 * _ID) | (before << _ID) | text[places]
    order = np.argsort(sorting)
    sorting, places = sorting[order], places[order]
    if not len(places):
        return _Level(places, places, places.astype(np.bool_), places, places)
    # Runs are of one n-gram and one id after it; groups of one n-gram.
    runs = _firsts(sorting)
    counts = np.diff(runs, append=len(places))
    ranks = (counts << _PLACE) | np.maximum.reduceat(places, runs)
    keys = sorting[runs] >> _ID
    groups = _firsts(keys)
    place = np.maximum.reduceat(ranks, groups) & ((1 << _PLACE) - 1)
    sizes = np.add.reduceat(counts, groups)
    kept = np.repeat(sizes > 1, sizes)
    node = np.repeat(np.arange(len(groups)), sizes)
    return _Level(keys[groups], place, sizes == 1, places[kept], node[kept])


def _firsts(ordered: Ints) -> Ints:
    """Where runs of equal numbers begin."""
    return np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
