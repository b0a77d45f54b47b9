"""The corpus of Parquet and Arrow IPC (Feather) files: one document a row."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import attrs

from blt_core.component import BuildContext, Component, not_empty
from blt_core.errors import DataError, near_match
from blt_core.files import expand_home, stand_in
from blt_plugins.training.corpora.arrow import arrow, arrow_errors
from blt_plugins.training.corpora.files import match_files
from blt_plugins.training.corpora.index import Part
from blt_plugins.training.corpora.sources import Files
from blt_plugins.training.corpora.stored import StoredCorpus, StoredCorpusParams
from blt_plugins.training.corpora.urls import shown

if TYPE_CHECKING:
    import pyarrow as pa

#: Groups of rows that stay decoded, since documents near each other are read together.
GROUPS = 2


@attrs.frozen(kw_only=True)
class ParquetCorpusParams(StoredCorpusParams):
    """path: a file, a glob such as ``data/**/*.parquet``, or a URL of one.

    text_key: the column of the texts.
    valid_path: held-out files, as ``path``; without it about ``valid_percent`` of the documents are
    held out, by their content. Texts that are null or empty are passed over.
    """

    path: str = attrs.field(converter=expand_home)
    text_key: str = attrs.field(default="text", validator=not_empty())
    valid_path: str | None = attrs.field(
        default=None, converter=attrs.converters.optional(expand_home)
    )


class RowReader:
    """The rows of some files; a document's place is the number of its row."""

    any_order = False  # whole groups of rows are decoded

    def __init__(self, files: Files, text_key: str) -> None:
        arrow()
        self.files, self._key = files, text_key
        self.settings: Mapping[str, Any] = {"text_key": text_key}
        self._tables: dict[int, _Table] = {}
        self._groups: OrderedDict[tuple[int, int], pa.ChunkedArray | pa.Array] = OrderedDict()

    def parts(self, file: int, file_bytes: int, most: int) -> Sequence[Part]:
        """Whole groups of rows."""
        starts = self._table(file).starts
        step = max(len(starts) - 1, 1) * most // file_bytes + 1
        bounds = [*starts[:-1:step], starts[-1]]
        return [Part(file, begin, end) for begin, end in pairwise(bounds)] or [Part(file)]

    def scan(self, part: Part) -> Iterator[tuple[int, bytes]]:
        """(place, text) of all documents of a part."""
        file, starts = part.file, self._table(part.file).starts
        end = starts[-1] if part.end is None else part.end
        for group in range(bisect_left(starts, part.begin), bisect_left(starts, end)):
            self._groups.clear()  # each is read once, and a group may be large
            yield from self._rows(file, group)

    def _rows(self, file: int, group: int) -> Iterator[tuple[int, bytes]]:
        starts, column = self._table(file).starts, self._table(file).column(group)
        for row in range(starts[group + 1] - starts[group]):
            yield starts[group] + row, self._text(file, column, row)

    def texts(self, file: int, places: Iterable[int]) -> Iterator[bytes]:
        """The texts of some documents of a file."""
        starts = self._table(file).starts
        for place in places:
            group = bisect_right(starts, place) - 1
            yield self._text(file, self._group(file, group), place - starts[group])

    def name(self, file: int, place: int) -> str:
        """The file, and the number of the row."""
        return f"{shown(self.files.names[file])}#{place}"

    def _text(self, file: int, column: Any, row: int) -> bytes:
        with _errors(self.files, file):
            value = column[row].as_py()
        return b"" if value is None else bytes(value)

    def _table(self, file: int) -> _Table:
        if file not in self._tables:
            self._tables[file] = _Table(self.files, file, self._key)
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

    def __init__(self, files: Files, number: int, key: str) -> None:
        self._errors, self._key = partial(_errors, files, number), key
        path = shown(files.names[number])
        with self._errors():
            file = _open(files, number)
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
        with self._errors():
            self.starts = [0]
            for size in _group_sizes(file):
                self.starts.append(self.starts[-1] + size)

    def column(self, group: int) -> pa.ChunkedArray | pa.Array:
        """The texts of one group, as binary."""
        pa = arrow()
        with self._errors():
            if _is_parquet(self._file):
                column = self._file.read_row_group(group, columns=[self._key]).column(self._key)
            else:
                column = self._file.get_batch(group).column(self._key)
            return column.cast(pa.large_binary())


def _open(files: Files, number: int) -> Any:
    """The file, of which groups are read when they are needed: mapped, or behind its URL."""
    pa, name = arrow(), files.names[number]
    with files.opened(number) as file:
        file.seek(0)
        beginning = file.read(200)
    if beginning.startswith(b"PAR1"):
        from pyarrow import parquet

        if files.url is None:
            return parquet.ParquetFile(name, memory_map=True)
        return parquet.ParquetFile(files.held(number), pre_buffer=True)
    if beginning.startswith(b"ARROW1"):
        return pa.ipc.open_file(pa.memory_map(name) if files.url is None else files.held(number))
    what = (
        stand_in(beginning) or "neither a Parquet file nor an Arrow IPC file (Feather, version 2)"
    )
    raise DataError(f"{shown(name)}: {what}")


@contextmanager
def _errors(files: Files, number: int) -> Iterator[None]:
    """Raise DataError, naming the file, for one that cannot be read or is damaged."""
    name = files.names[number]
    if files.url is None:
        with arrow_errors(name):
            yield
        return
    with files.errors(number):
        try:
            yield
        except arrow().ArrowException as error:
            raise DataError(f"{shown(name)}: damaged: {str(error).splitlines()[0]}") from error


def _is_parquet(file: Any) -> bool:
    return hasattr(file, "num_row_groups")


def _group_sizes(file: Any) -> list[int]:
    if _is_parquet(file):
        return [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return [file.get_batch(i).num_rows for i in range(file.num_record_batches)]


class ParquetCorpus(StoredCorpus):
    """Raises DataError, when it is made, without pyarrow or if there is no such file."""

    def __init__(self, params: ParquetCorpusParams, context: BuildContext) -> None:
        def reader(path: str) -> RowReader:
            files = match_files(path, "*.parquet", params.storage_options)
            return RowReader(files, params.text_key)

        arrow()
        valid = params.valid_path
        super().__init__(reader(params.path), None if valid is None else reader(valid), params)


PARQUET_CORPUS = Component(
    kind="corpus",
    name="parquet",
    factory=ParquetCorpus,
    params=ParquetCorpusParams,
    summary="the rows of Parquet and Arrow IPC files, one document each (extra: data)",
)
