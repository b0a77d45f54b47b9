"""The corpus of Parquet and Arrow IPC (Feather) files: one document a row."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from blt_core.component import BuildContext, Component, between, not_empty
from blt_core.errors import DataError, near_match
from blt_core.files import expand_home, stand_in
from blt_plugins.training.corpora.arrow import arrow, arrow_errors
from blt_plugins.training.corpora.files import match_files
from blt_plugins.training.corpora.stored import StoredCorpus

if TYPE_CHECKING:
    import pyarrow as pa

#: Groups of rows that stay decoded, since documents near each other are read together.
GROUPS = 2


@attrs.frozen(kw_only=True)
class ParquetCorpusParams:
    """path: a file, or a glob such as ``data/**/*.parquet``. text_key: the column of the texts.

    valid_path: held-out files, as ``path``; without it about ``valid_percent`` of the documents are
    held out, by their content. Texts that are null or empty are passed over.
    valid_percent: how many of the documents are held out where nothing else says it.
    """

    path: str = attrs.field(converter=expand_home)
    text_key: str = attrs.field(default="text", validator=not_empty())
    valid_path: str | None = attrs.field(
        default=None, converter=attrs.converters.optional(expand_home)
    )
    valid_percent: float = attrs.field(default=5.0, validator=between(0, 50))


class RowReader:
    """The rows of some files; a document's place is the number of its row."""

    def __init__(self, path: str, text_key: str) -> None:
        arrow()
        self.files = match_files(path, "*.parquet")
        self._key = text_key
        self._tables: dict[int, _Table] = {}
        self._groups: OrderedDict[tuple[int, int], pa.ChunkedArray | pa.Array] = OrderedDict()

    def scan(self) -> Iterator[tuple[int, int, bytes]]:
        """(file, place, text) of all documents."""
        for number in range(len(self.files)):
            starts = self._table(number).starts
            for group, start in enumerate(starts[:-1]):
                column = self._group(number, group)
                for row in range(starts[group + 1] - start):
                    yield number, start + row, self._text(number, column, row)

    def read(self, file: int, place: int) -> bytes:
        """The text of one document."""
        starts = self._table(file).starts
        group = bisect_right(starts, place) - 1
        return self._text(file, self._group(file, group), place - starts[group])

    def name(self, file: int, place: int) -> str:
        """The file, and the number of the row."""
        return f"{self.files[file]}#{place}"

    def _text(self, file: int, column: Any, row: int) -> bytes:
        with arrow_errors(self.files[file]):
            value = column[row].as_py()
        return b"" if value is None else bytes(value)

    def _table(self, file: int) -> _Table:
        if file not in self._tables:
            self._tables[file] = _Table(self.files[file], self._key)
        return self._tables[file]

    def _group(self, file: int, group: int) -> Any:
        key = (file, group)
        if key not in self._groups:
            while len(self._groups) >= GROUPS:
                self._groups.popitem(last=False)
            self._groups[key] = self._table(file).column(group)
        self._groups.move_to_end(key)
        return self._groups[key]


class _Table:
    """One file. starts: the first row of each group (row group, record batch), and their end."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        with arrow_errors(path):
            file = _open(path)
        schema = file.schema_arrow if _is_parquet(file) else file.schema
        if key not in schema.names:
            near = near_match(key, schema.names)
            has = ", ".join(schema.names) or "none"
            raise DataError(f"{path}: no column {key!r} (corpus.text_key).{near}\n  columns: {has}")
        kind, types = schema.field(key).type, arrow().types
        if not any(
            is_kind(kind)
            for is_kind in (
                types.is_string, types.is_large_string, types.is_binary, types.is_large_binary,
            )
        ):  # fmt: skip
            raise DataError(f"{path}: column {key!r} holds {kind}; texts are string or binary")
        self._file = file
        with arrow_errors(path):
            self.starts = [0]
            for size in _group_sizes(file):
                self.starts.append(self.starts[-1] + size)

    def column(self, group: int) -> pa.ChunkedArray | pa.Array:
        """The texts of one group, as binary."""
        pa = arrow()
        with arrow_errors(self._path):
            if _is_parquet(self._file):
                column = self._file.read_row_group(group, columns=[self._key]).column(self._key)
            else:
                column = self._file.get_batch(group).column(self._key)
            return column.cast(pa.large_binary())


def _open(path: Path) -> Any:
    pa = arrow()
    with path.open("rb") as file:
        beginning = file.read(200)
    if beginning.startswith(b"PAR1"):
        from pyarrow import parquet

        return parquet.ParquetFile(path, memory_map=True)
    if beginning.startswith(b"ARROW1"):
        return pa.ipc.open_file(pa.memory_map(str(path)))
    what = (
        stand_in(beginning) or "neither a Parquet file nor an Arrow IPC file (Feather, version 2)"
    )
    raise DataError(f"{path}: {what}")


def _is_parquet(file: Any) -> bool:
    return hasattr(file, "num_row_groups")


def _group_sizes(file: Any) -> list[int]:
    if _is_parquet(file):
        return [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return [file.get_batch(i).num_rows for i in range(file.num_record_batches)]


class ParquetCorpus(StoredCorpus):
    """Raises DataError, when it is made, without pyarrow or if there is no such file."""

    def __init__(self, params: ParquetCorpusParams, context: BuildContext) -> None:
        valid = params.valid_path
        super().__init__(
            RowReader(params.path, params.text_key),
            RowReader(valid, params.text_key) if valid is not None else None,
            params.valid_percent,
        )


PARQUET_CORPUS = Component(
    kind="corpus",
    name="parquet",
    factory=ParquetCorpus,
    params=ParquetCorpusParams,
    summary="the rows of Parquet and Arrow IPC files, one document each (extra: data)",
)
