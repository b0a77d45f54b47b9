"""What is read from files and written to them: checkpoints and corpora."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor


@runtime_checkable
class CheckpointFormat(Protocol):
    """Reads and writes trained models.

    ``recognises`` says whether such a checkpoint is at a location, by what is there: all formats
    are asked, and one alone may say yes. ``NAME:…`` is for the format of that name.

    ``read`` gives the config table that rebuilds the model and a mapping from parameter name
    (``decoder.layers.0.…``: dotted config path + name within the module) to tensor, best one that
    reads a tensor when it is asked for (:class:`blt_core.storage.safetensors.LazyTensors`).
    ``write`` is given the table with every key, and must leave either the old state or the new one,
    never half of each.
    """

    def recognises(self, location: str) -> bool: ...
    def read(self, location: str) -> tuple[dict[str, Any], Mapping[str, Tensor]]: ...
    def write(
        self, location: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None: ...


class Documents(Protocol):
    """Texts in a fixed order, each read when it is asked for.

    sizes: int64 (documents,), the bytes of each, none of them 0. digest: names the contents and
    their order. ``source``: where a document is from, for messages and for what is made of it.
    Reading raises DataError, which names the file, where it cannot be read or has changed.
    """

    sizes: npt.NDArray[np.int64]
    digest: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> bytes: ...
    def source(self, index: int) -> str: ...


@runtime_checkable
class WeightedDocuments(Documents, Protocol):
    """Documents that a pass reads more than once, or of which it reads a part.

    weights: (documents, passes over them in one pass of the whole) of consecutive runs.
    """

    weights: Sequence[tuple[int, float]]


@runtime_checkable
class PatchedDocuments(Documents, Protocol):
    """Documents whose patches are known.

    patching: what the patches depend on, None if they are not known after all. ``opens``: bool
    (bytes + 1,), for each byte and EOS, whether it opens a patch.
    """

    patching: Mapping[str, Any] | None

    def opens(self, index: int) -> npt.NDArray[np.bool_]: ...


@runtime_checkable
class ScatteredDocuments(Documents, Protocol):
    """Documents of which several are read at a time.

    any_order: whether texts far apart are read about as quickly as neighbours; else training reads
    a whole pool in the order of the documents before the pool's first batch. ``texts``: those of
    several documents, by an array of their numbers, in that order; each is read when it is asked
    for, and what neighbours share, such as a file that is opened, is done once.
    """

    any_order: bool

    def texts(self, numbers: npt.NDArray[np.int64]) -> Iterator[bytes]: ...


@runtime_checkable
class Corpus(Protocol):
    """Documents to train on; ``split`` is "train" or "valid"."""

    def documents(self, split: Literal["train", "valid"]) -> Documents: ...
