"""Several corpora as one, each read as often as its weight says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from blt_core.component import BuildContext, Component, nested_table
from blt_core.errors import DataError, near_match
from blt_core.protocols import Corpus, Documents
from blt_plugins.training.corpora.index import Ints
from blt_plugins.training.corpora.pieces import in_any_order, texts_of
from blt_plugins.training.corpora.stored import Split
from blt_plugins.training.corpora.weights import weights_of

#: Passes over a part in one pass of the whole; more would be a slip.
MOST = 1000


def _positive(_: object, __: attrs.Attribute[Any], weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not 0 < weight <= MOST:
            raise ValueError(f"{name} = {weight}: expected more than 0, and at most {MOST}")


@attrs.frozen(kw_only=True)
class MixtureParams:
    """parts: a corpus under each name. weights: passes over it in one pass of the whole (or 1).

    2.0 reads all of it twice; 0.5 a half, and the other half in the next pass.
    """

    parts: Mapping[str, Corpus] = nested_table("corpus")
    weights: Mapping[str, float] = attrs.field(factory=dict, validator=_positive)

    def __attrs_post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts: a mixture needs at least one corpus")
        for name in self.weights:
            if name not in self.parts:
                near = near_match(name, self.parts)
                raise ValueError(f"weights.{name}: no such part.{near}")


class MixedDocuments:
    """The documents of all parts, one part after the other.

    weights, patching, any_order: as in :mod:`blt_core.protocols`.
    """

    def __init__(self, parts: Mapping[str, Documents], weights: Mapping[str, float]) -> None:
        self._parts = list(parts.values())
        self.sizes = np.concatenate([np.asarray(p.sizes, dtype=np.int64) for p in self._parts])
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.weights: Sequence[tuple[int, float]] = [
            (count, weights.get(name, 1.0) * weight)
            for name, part in parts.items()
            for count, weight in weights_of(part)
        ]
        total = hashlib.sha256(repr([(c, float(w)) for c, w in self.weights]).encode())
        for part in self._parts:
            total.update(part.digest.encode())
        self.digest = total.hexdigest()
        self.patching = _common_patching(parts)
        self.any_order = all(map(in_any_order, self._parts))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> bytes:
        """The text of a document."""
        part, own = self._find(index)
        return part[own]

    def texts(self, numbers: Ints) -> Iterator[bytes]:
        """The texts of several documents."""
        part_of = np.searchsorted(self._ends, numbers, side="right")
        for run in np.split(numbers, np.flatnonzero(np.diff(part_of)) + 1):
            part, own = self._find(int(run[0]))
            yield from texts_of(part, run - int(run[0]) + own)

    def source(self, index: int) -> str:
        """Where a document is from."""
        part, own = self._find(index)
        return part.source(own)

    def opens(self, index: int) -> npt.NDArray[np.bool_]:
        """The patches of a document, where all parts know them."""
        part, own = self._find(index)
        opens: npt.NDArray[np.bool_] = part.opens(own)  # type: ignore[attr-defined]
        return opens

    def _find(self, index: int) -> tuple[Documents, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[number], index - int(self._ends[number]) + len(self._parts[number])


def _common_patching(parts: Mapping[str, Documents]) -> Mapping[str, Any] | None:
    """What the patches of all parts depend on; None if some part's are not known."""
    found = {n: getattr(part, "patching", None) for n, part in parts.items() if len(part)}
    if not found or None in found.values():
        return None
    (first, common), *others = found.items()
    for name, other in others:
        if other != common:
            key = next(k for k in {**common, **other} if common.get(k) != other.get(k))
            raise DataError(
                f"corpus.parts: {first!r} and {name!r} were prepared differently: {key} "
                f"{common.get(key)!r} and {other.get(key)!r}\n  fix: prepare them anew, both alike"
            )
    return dict(common)


class MixtureCorpus:
    """Nested corpora; what each holds out is held out of the whole, once whatever its weight."""

    def __init__(self, params: MixtureParams, context: BuildContext) -> None:
        self._parts, self._weights = params.parts, params.weights

    def documents(self, split: Split) -> MixedDocuments:
        """The documents of one split of all parts. Raises DataError as the parts do."""
        parts = {name: corpus.documents(split) for name, corpus in self._parts.items()}
        return MixedDocuments(parts, self._weights if split == "train" else {})


MIXTURE_CORPUS = Component(
    kind="corpus",
    name="mixture",
    factory=MixtureCorpus,
    params=MixtureParams,
    summary="several corpora, each read as often as its weight says",
)
