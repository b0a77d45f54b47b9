"""The corpus that ``blt prepare`` writes: documents with their patches, memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from blt_core.component import BuildContext, Component
from blt_core.errors import DataError
from blt_core.files import expand_home, stand_in_at
from blt_plugins.training.corpora.arrow import arrow, arrow_errors
from blt_plugins.training.corpora.shards import (
    Manifest,
    check_shard,
    load_manifest,
    open_shard,
    shard_metadata,
)
from blt_plugins.training.corpora.stored import Split


@attrs.frozen(kw_only=True)
class PreparedCorpusParams:
    """path: the folder that ``blt prepare`` wrote; it says which documents are held out."""

    path: str = attrs.field(converter=expand_home)


class PreparedDocuments:
    """The documents of some shards; their sizes are kept in memory, all else is mapped.

    patching, weights, any_order: as in :mod:`blt_core.protocols`.
    """

    any_order = True

    def __init__(self, folder: Path, manifest: Manifest, split: Split) -> None:
        self.digest, self.patching = manifest.digests[split], manifest.patching
        count = manifest.documents[split]
        self.weights: Sequence[tuple[int, float]] = (
            [(int(n), float(weight)) for n, weight in manifest.weights]
            if split == "train"
            else [(count, 1.0)]
        )
        self._paths = [folder / name for name in manifest.of(split)]
        self._files = open_shards(folder, manifest, split)
        self._batches = [
            (number, batch)
            for number, file in enumerate(self._files)
            for batch in range(file.num_record_batches)
        ]
        sizes = [self._sizes(*batch) for batch in self._batches]
        self.sizes = np.concatenate([np.zeros(0, dtype=np.int64), *sizes])
        self._ends = np.cumsum([len(each) for each in sizes])
        if len(self.sizes) != count:
            raise DataError(f"{folder}: holds {len(self.sizes)} documents of {count} in {split}")
        self._latest: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> bytes:
        """The text of a document."""
        text: bytes = self._cell(index, "text").as_py()
        return text

    def texts(self, numbers: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """The texts of several documents."""
        return (self[number] for number in numbers.tolist())

    def opens(self, index: int) -> npt.NDArray[np.bool_]:
        """Bool (bytes + 1,): whether each byte, and EOS, opens a patch."""
        found: npt.NDArray[np.bool_] = self._cell(index, "opens").values.to_numpy(
            zero_copy_only=False
        )
        return found

    def source(self, index: int) -> str:
        """Where the document was from."""
        return str(self._cell(index, "source"))

    def _sizes(self, file: int, batch: int) -> npt.NDArray[np.int64]:
        """The bytes of each text of a record batch; the texts themselves are not touched."""
        with arrow_errors(self._paths[file]):
            column = self._files[file].get_batch(batch).column("text")
            offsets = np.frombuffer(column.buffers()[1], dtype=np.int64)
            return np.diff(offsets[column.offset : column.offset + len(column) + 1])

    def _cell(self, index: int, column: str) -> Any:
        number = int(np.searchsorted(self._ends, index, side="right"))
        file, batch = self._batches[number]
        if self._latest is None or self._latest[0] != number:
            with arrow_errors(self._paths[file]):
                self._latest = number, self._files[file].get_batch(batch)
        records = self._latest[1]
        return records.column(column)[index - int(self._ends[number]) + records.num_rows]


class PreparedCorpus:
    """Raises DataError, when it is made, for a folder that is not whole."""

    def __init__(self, params: PreparedCorpusParams, context: BuildContext) -> None:
        arrow()
        self._folder = Path(params.path)
        manifest = load_manifest(self._folder)
        if manifest is None:
            raise DataError(f"{self._folder}: no prepared corpus; blt prepare makes one")
        if not manifest.complete:
            raise DataError(f"{self._folder}: not finished; run its blt prepare command again")
        check_files(self._folder, manifest)
        self._manifest = manifest
        self._found: Mapping[Split, PreparedDocuments] = {}

    def documents(self, split: Split) -> PreparedDocuments:
        """The documents of one split. Raises DataError for a file that cannot be read."""
        if split not in self._found:
            found = PreparedDocuments(self._folder, self._manifest, split)
            self._found = {**self._found, split: found}
        return self._found[split]


def open_shards(folder: Path, manifest: Manifest, split: Split) -> list[Any]:
    """The mapped files of a split. Raises DataError for one that is from another folder."""
    files, first = [], 0
    for name, shard in manifest.of(split).items():
        file = open_shard(folder / name)
        expected = shard_metadata(manifest.patching, manifest.digests[split], split, first)
        check_shard(folder / name, file, expected)
        files.append(file)
        first += shard.documents
    return files


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise DataError if a shard is not there, or not as long as it was."""
    for name, shard in manifest.shards.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.file_bytes:
            if size is not None and (found := stand_in_at(path)):
                raise DataError(f"{path}: {found}")
            what = "is missing" if size is None else f"has {size} bytes of {shard.file_bytes}"
            raise DataError(f"{path}: {what}; run blt prepare again, which makes it anew")


PREPARED_CORPUS = Component(
    kind="corpus",
    name="prepared",
    factory=PreparedCorpus,
    params=PreparedCorpusParams,
    summary="documents with their patches, as blt prepare writes them (extra: data)",
)
