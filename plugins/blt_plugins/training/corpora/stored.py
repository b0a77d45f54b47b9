"""Documents that stay in their files, and how some are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Literal

import attrs
import numpy as np

from blt_core.component import between
from blt_core.errors import DataError
from blt_core.files import expand_home
from blt_plugins.training.corpora.index import Index, Ints, Reader, key_of
from blt_plugins.training.corpora.index_file import Check, Keeping, entries_of
from blt_plugins.training.corpora.urls import shown

Split = Literal["train", "valid"]

Scalar = bool | int | float | str
#: Options of a file system: plain values, and tables of them, such as ``client_kwargs``.
Options = Mapping[str, Scalar | Mapping[str, Scalar]]


@attrs.frozen(kw_only=True)
class StoredCorpusParams:
    """valid_percent: how many documents are held out, by their content, without a valid_path.

    index: the folder where the index of the texts is kept; without it, a hidden folder beside them,
    or the user's cache folder.
    check: stat trusts what it knows of files of the same size and times; full reads all of them.
    storage_options: for URLs, the options of fsspec's file system, such as ``anon`` or
    ``client_kwargs``.
    """

    valid_percent: float = attrs.field(default=5.0, validator=between(0, 50))
    index: str | None = attrs.field(default=None, converter=attrs.converters.optional(expand_home))
    check: Check = "stat"
    storage_options: Options = attrs.field(factory=dict)


class StoredDocuments:
    """The documents of an index, read from their files when they are asked for.

    any_order: as in :mod:`blt_core.protocols`.
    """

    def __init__(self, reader: Reader, index: Index) -> None:
        self._reader, self._index, self.any_order = reader, index, reader.any_order
        self.sizes = index.sizes
        total = hashlib.sha256(index.sizes.astype("<i8").tobytes())
        total.update(index.keys.astype("<u8").tobytes())
        self.digest = total.hexdigest()

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> bytes:
        """The text of a document. Raises DataError if it has changed since it was indexed."""
        (text,) = self.texts([index])
        return text

    def texts(self, numbers: Sequence[int] | Ints) -> Iterator[bytes]:
        """The texts of several documents; of neighbours the file is opened once.

        Raises DataError, when it comes to it, for one that has changed since it was indexed.
        """
        index, chosen = self._index, np.asarray(numbers, dtype=np.int64)
        columns = (index.files, index.places, index.sizes, index.keys)
        rows = zip(*(column[chosen].tolist() for column in columns), strict=True)
        for file, group in groupby(rows, key=itemgetter(0)):
            known = list(group)
            texts = self._reader.texts(file, [place for _, place, _, _ in known])
            for text, (_, _, size, key) in zip(texts, known, strict=True):
                if len(text) != size or key_of(text) != key:
                    raise self._changed(file)
                yield text

    def _changed(self, file: int) -> DataError:
        self._reader.files.forget([file])
        return DataError(
            f"{shown(self._reader.files.names[file])}: changed while it was in use; "
            "run the command again\n"
            '  fix: if that says the same, set corpus.check = "full" for one run'
        )

    def source(self, index: int) -> str:
        """Where a document is from."""
        return self._reader.name(int(self._index.files[index]), int(self._index.places[index]))


class StoredCorpus:
    """Documents of files, which are read once to index them; what is known of them is kept.

    valid: the held-out documents; None: about ``valid_percent`` of the others.
    """

    def __init__(self, train: Reader, valid: Reader | None, params: StoredCorpusParams) -> None:
        self._train, self._valid, self._percent = train, valid, params.valid_percent
        self._keeping = Keeping(params.index, params.check)
        self._found: dict[Split, StoredDocuments] = {}

    def documents(self, split: Split) -> StoredDocuments:
        """The documents of one split. Raises DataError for a file that cannot be read."""
        if not self._found:
            index = entries_of(self._train, self._keeping).index()
            if not len(index.sizes):
                name = shown(self._train.files.names[0])
                raise DataError(f"{name}: it and all other files hold no text")
            if self._valid is not None:
                held = entries_of(self._valid, self._keeping).index()
            else:
                index, held = index.split(self._percent)
            self._found = {
                "train": StoredDocuments(self._train, index),
                "valid": StoredDocuments(self._valid or self._train, held),
            }
        return self._found[split]
