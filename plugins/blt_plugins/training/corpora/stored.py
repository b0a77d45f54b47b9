"""Documents that stay in their files: an index of them, and how some are held out."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import attrs
import numpy as np
import numpy.typing as npt

from blt_core.errors import DataError

Split = Literal["train", "valid"]


class Reader(Protocol):
    """Reads the documents of some files; a document has a file's number and a place in it."""

    files: Sequence[Path]

    def scan(self) -> Iterator[tuple[int, int, bytes]]:
        """(file, place, text) of all documents, in order; DataError for what cannot be read."""
        ...

    def read(self, file: int, place: int) -> bytes:
        """The text of one document."""
        ...

    def name(self, file: int, place: int) -> str:
        """What to call a document."""
        ...


@attrs.frozen(eq=False)
class Index:
    """All that is kept in memory of each document: 32 bytes.

    sizes: int64, in bytes. keys: uint64, the first 8 bytes of the text's SHA-256. files, places:
    int64, where to read it.
    """

    sizes: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]
    files: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]

    def where(self, taken: npt.NDArray[np.bool_]) -> Index:
        """The documents where ``taken`` is True."""
        columns = (self.sizes, self.keys, self.files, self.places)
        return Index(*(column[taken] for column in columns))

    def split(self, percent: float) -> tuple[Index, Index]:
        """The documents to train on, and about ``percent`` of them held out.

        Of two and more at least one, unless ``percent`` is 0. Those with the smallest keys are held
        out, so copies of a text never lie on both sides.
        """
        share = len(self.keys) * percent / 100
        count = min(max(round(share), 1), len(self.keys) - 1) if share else 0
        held = np.zeros(len(self.keys), bool)
        if count > 0:
            held = self.keys < np.partition(self.keys, count)[count]
        return self.where(~held), self.where(held)


def make_index(reader: Reader) -> Index:
    """Read all documents once, one at a time. Empty ones are left out."""
    sizes, files, places, keys = array("q"), array("q"), array("q"), array("Q")
    for file, place, text in reader.scan():
        if text:
            sizes.append(len(text))
            keys.append(int.from_bytes(hashlib.sha256(text).digest()[:8], "big"))
            files.append(file)
            places.append(place)
    signed = (np.array(each, dtype=np.int64) for each in (sizes, files, places))
    sizes_n, files_n, places_n = signed
    return Index(sizes_n, np.array(keys, dtype=np.uint64), files_n, places_n)


class StoredDocuments:
    """The documents of an index, read from their files when they are asked for."""

    def __init__(self, reader: Reader, index: Index) -> None:
        self._reader, self._index = reader, index
        self.sizes = index.sizes
        total = hashlib.sha256(index.sizes.astype("<i8").tobytes())
        total.update(index.keys.astype("<u8").tobytes())
        self.digest = total.hexdigest()

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> bytes:
        """The text of a document. Raises DataError if it has changed since it was indexed."""
        file, place = int(self._index.files[index]), int(self._index.places[index])
        text = self._reader.read(file, place)
        if len(text) != self.sizes[index]:
            raise DataError(
                f"{self._reader.files[file]}: changed while it was in use; run the command again"
            )
        return text

    def source(self, index: int) -> str:
        """Where a document is from."""
        return self._reader.name(int(self._index.files[index]), int(self._index.places[index]))


class StoredCorpus:
    """Documents of files; all are read once to index them, when they are first asked for.

    valid: the held-out documents; None: about ``percent`` of the others.
    """

    def __init__(self, train: Reader, valid: Reader | None, percent: float) -> None:
        self._train, self._valid, self._percent = train, valid, percent
        self._found: dict[Split, StoredDocuments] = {}

    def documents(self, split: Split) -> StoredDocuments:
        """The documents of one split. Raises DataError for a file that cannot be read."""
        if not self._found:
            index = make_index(self._train)
            if not len(index.sizes):
                raise DataError(f"{self._train.files[0]}: it and all other files hold no text")
            if self._valid is not None:
                held = make_index(self._valid)
            else:
                index, held = index.split(self._percent)
            self._found = {
                "train": StoredDocuments(self._train, index),
                "valid": StoredDocuments(self._valid or self._train, held),
            }
        return self._found[split]
