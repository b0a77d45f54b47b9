"""The corpus of JSON Lines files: one document a line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, BinaryIO

import attrs

from blt_core.component import BuildContext, Component, not_empty
from blt_core.errors import DataError
from blt_core.files import expand_home, parse_json
from blt_plugins.training.corpora.compressed import Decompressed, is_compressed
from blt_plugins.training.corpora.files import match_files
from blt_plugins.training.corpora.index import Part
from blt_plugins.training.corpora.sources import Files, check_end
from blt_plugins.training.corpora.stored import StoredCorpus, StoredCorpusParams
from blt_plugins.training.corpora.urls import shown

#: Bytes of a line of another part that are in memory at a time.
_PIECE = 1 << 16


@attrs.frozen(kw_only=True)
class JsonlCorpusParams(StoredCorpusParams):
    """path: a file, a glob such as ``data/**/*.jsonl``, or a URL of one.

    Compressed files (.gz, .bz2, .xz, .zst) are decompressed once, into the user's cache folder.
    text_key: the key that holds the text.
    valid_path: held-out files, as ``path``; without it about ``valid_percent`` of the documents are
    held out, by their content. Empty lines, and texts that are null or empty, are passed over.
    """

    path: str = attrs.field(converter=expand_home)
    text_key: str = attrs.field(default="text", validator=not_empty())
    valid_path: str | None = attrs.field(
        default=None, converter=attrs.converters.optional(expand_home)
    )


class LineReader:
    """The lines of some files; a document's place is the offset of its line, in bytes."""

    def __init__(self, files: Files, text_key: str) -> None:
        self.files: Files = Decompressed(files) if any(map(is_compressed, files.names)) else files
        # Behind a URL each look into a file is a request, but copies are here.
        self.any_order = files.url is None or all(map(is_compressed, files.names))
        self.settings: Mapping[str, Any] = {"text_key": text_key}
        self._key = text_key

    def parts(self, file: int, file_bytes: int, most: int) -> Sequence[Part]:
        """Ranges of bytes; a line is in that of its first byte."""
        if is_compressed(self.files.names[file]):
            return [Part(file)]
        bounds = [*range(0, file_bytes, most), None]
        return [Part(file, begin or 0, end) for begin, end in pairwise(bounds)]

    def scan(self, part: Part) -> Iterator[tuple[int, bytes]]:
        """(place, text) of all documents of a part."""
        with self.files.opened(part.file, in_order=True) as file:
            place = _first_line(file, part)
            while part.end is None or place < part.end:
                line = file.readline()
                if not line.endswith(b"\n"):
                    check_end(self.files.names[part.file], file, place + len(line))
                if not line:
                    break
                if line.strip():
                    yield place, self._text_at(part.file, place, line)
                place += len(line)

    def texts(self, file: int, places: Iterable[int]) -> Iterator[bytes]:
        """The texts of some documents of a file, which is opened once."""
        name = shown(self.files.names[file])
        with self.files.opened(file) as stream:
            for place in places:
                stream.seek(place)
                yield self._text(stream.readline(), f"{name}: line at byte {place}")

    def name(self, file: int, place: int) -> str:
        """The file, and the offset of the line."""
        return f"{shown(self.files.names[file])}@{place}"

    def _text_at(self, file: int, place: int, line: bytes) -> bytes:
        """The text of a line, which is called by its number if it is at fault."""
        try:
            return self._text(line, "")
        except DataError:
            name = shown(self.files.names[file])
        with self.files.opened(file, in_order=True) as stream:
            number = _lines(stream, place) + 1
        return self._text(line, f"{name}:{number}")

    def _text(self, line: bytes, where: str) -> bytes:
        try:
            record = parse_json(line)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        if not isinstance(record, dict) or self._key not in record:
            has = (
                f"it has {', '.join(map(repr, record))}"
                if isinstance(record, dict)
                else "no object"
            )
            raise DataError(f"{where}: no key {self._key!r} (corpus.text_key); {has}")
        text = record[self._key]
        if text is None:
            return b""
        if not isinstance(text, str):
            raise DataError(f"{where}: {self._key!r} is no string, but {type(text).__name__}")
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: {self._key!r} holds half a surrogate pair") from error


def _first_line(file: BinaryIO, part: Part) -> int:
    """Go to the first line that begins in a part; where that is, or a place after the part."""
    if not part.begin:
        return 0
    place = file.seek(part.begin - 1)
    while part.end is None or place < part.end:
        piece = file.readline(_PIECE)  # the line of another part may be far longer than this one
        place += len(piece)
        if not piece or piece.endswith(b"\n"):
            break
    return place


def _lines(file: BinaryIO, end: int) -> int:
    """The line ends before a place."""
    count = 0
    while data := file.read(min(1 << 20, end)):
        count += data.count(b"\n")
        end -= len(data)
    return count


class JsonlCorpus(StoredCorpus):
    """Raises DataError, when it is made, if there is no such file."""

    def __init__(self, params: JsonlCorpusParams, context: BuildContext) -> None:
        def reader(path: str) -> LineReader:
            return LineReader(match_files(path, "*.jsonl", params.storage_options), params.text_key)

        valid = params.valid_path
        super().__init__(reader(params.path), None if valid is None else reader(valid), params)


JSONL_CORPUS = Component(
    kind="corpus",
    name="jsonl",
    factory=JsonlCorpus,
    params=JsonlCorpusParams,
    summary="the lines of JSON Lines files, one document each",
)
