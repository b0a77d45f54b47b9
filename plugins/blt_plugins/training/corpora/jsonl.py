"""The corpus of JSON Lines files: one document a line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import attrs

from blt_core.component import BuildContext, Component, between, not_empty
from blt_core.errors import DataError
from blt_core.files import expand_home, parse_json
from blt_core.storage.folders import file_errors
from blt_plugins.training.corpora.files import match_files
from blt_plugins.training.corpora.stored import StoredCorpus


@attrs.frozen(kw_only=True)
class JsonlCorpusParams:
    """path: a file, or a glob such as ``data/**/*.jsonl``. text_key: the key that holds the text.

    valid_path: held-out files, as ``path``; without it about ``valid_percent`` of the documents are
    held out, by their content. Empty lines, and texts that are null or empty, are passed over.
    valid_percent: how many of the documents are held out where nothing else says it.
    """

    path: str = attrs.field(converter=expand_home)
    text_key: str = attrs.field(default="text", validator=not_empty())
    valid_path: str | None = attrs.field(
        default=None, converter=attrs.converters.optional(expand_home)
    )
    valid_percent: float = attrs.field(default=5.0, validator=between(0, 50))


class LineReader:
    """The lines of some files; a document's place is the offset of its line, in bytes."""

    def __init__(self, path: str, text_key: str) -> None:
        self.files = match_files(path, "*.jsonl")
        self._key = text_key
        for file in self.files:
            if file.suffix in {".gz", ".zst", ".bz2", ".xz"}:
                raise DataError(
                    f"{file}: documents are read in any order, which a compressed file does not "
                    "allow\n  fix: decompress it, or store it as Parquet"
                )

    def scan(self) -> Iterator[tuple[int, int, bytes]]:
        """(file, place, text) of all documents."""
        for number, path in enumerate(self.files):
            with file_errors(path, DataError), path.open("rb") as file:
                place = 0
                for count, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, place, self._text(line, f"{path}:{count}")
                    place += len(line)

    def read(self, file: int, place: int) -> bytes:
        """The text of one document."""
        path = self.files[file]
        with file_errors(path, DataError), path.open("rb") as stream:
            return self._text(_line_at(stream, place), f"{path}: line at byte {place}")

    def name(self, file: int, place: int) -> str:
        """The file, and the offset of the line."""
        return f"{self.files[file]}@{place}"

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


def _line_at(file: BinaryIO, place: int) -> bytes:
    file.seek(place)
    return file.readline()


class JsonlCorpus(StoredCorpus):
    """Raises DataError, when it is made, if there is no such file."""

    def __init__(self, params: JsonlCorpusParams, context: BuildContext) -> None:
        valid = params.valid_path
        super().__init__(
            LineReader(params.path, params.text_key),
            LineReader(valid, params.text_key) if valid is not None else None,
            params.valid_percent,
        )


JSONL_CORPUS = Component(
    kind="corpus",
    name="jsonl",
    factory=JsonlCorpus,
    params=JsonlCorpusParams,
    summary="the lines of JSON Lines files, one document each",
)
