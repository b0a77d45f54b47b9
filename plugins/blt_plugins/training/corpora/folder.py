"""The corpus of a folder: one document a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs

from blt_core.component import BuildContext, Component
from blt_core.files import expand_home
from blt_core.storage.texts import check_document, read_document
from blt_plugins.training.corpora.files import below, find_files, has_folders
from blt_plugins.training.corpora.index import Part
from blt_plugins.training.corpora.sources import Files, check_end
from blt_plugins.training.corpora.stored import StoredCorpus, StoredCorpusParams
from blt_plugins.training.corpora.urls import shown


@attrs.frozen(kw_only=True)
class FolderCorpusParams(StoredCorpusParams):
    """path: the folder (relative: to the working directory), or its URL.

    pattern: a glob, ** for any depth. Hidden files and folders (and ``__pycache__``, ``Thumbs.db``)
    are taken only where the pattern names them.
    valid_path: a folder of held-out files. Without it, ``train`` and ``valid`` below ``path`` are
    used if both exist; else about ``valid_percent`` of the files are held out, by their content.
    """

    path: str = attrs.field(converter=expand_home)
    pattern: str = "**/*"
    valid_path: str | None = attrs.field(
        default=None, converter=attrs.converters.optional(expand_home)
    )


class FileReader:
    """Files, each of which is a document; its place is always 0."""

    settings: Mapping[str, Any] = MappingProxyType({})
    any_order = True

    def __init__(self, files: Files) -> None:
        self.files = files

    def parts(self, file: int, file_bytes: int, most: int) -> Sequence[Part]:
        """The file, whole."""
        return [Part(file)]

    def scan(self, part: Part) -> Iterator[tuple[int, bytes]]:
        """The place and the text of the one document."""
        yield 0, self._text(part.file)

    def texts(self, file: int, places: Iterable[int]) -> Iterator[bytes]:
        """The text of the one document, for each place."""
        return (self._text(file) for _ in places)

    def _text(self, file: int) -> bytes:
        name = self.files.names[file]
        if self.files.url is None:
            return read_document(Path(name))
        with self.files.opened(file, in_order=True) as stream:
            text = stream.read()
            check_end(name, stream, len(text))
        return check_document(shown(name), text)

    def name(self, file: int, place: int) -> str:
        """The file's path within the folder."""
        return shown(self.files.label(file))


class FolderCorpus(StoredCorpus):
    """Raises DataError, when it is made, if a folder is missing or holds no such file."""

    def __init__(self, params: FolderCorpusParams, context: BuildContext) -> None:
        train, valid, options = params.path, params.valid_path, params.storage_options
        if valid is None and has_folders(train, ("train", "valid"), options):
            train, valid = below(train, "train"), below(train, "valid")
        readers = [
            FileReader(find_files(path, params.pattern, options))
            for path in (train, valid)
            if path is not None
        ]
        super().__init__(readers[0], readers[1] if valid is not None else None, params)


FOLDER_CORPUS = Component(
    kind="corpus",
    name="folder",
    factory=FolderCorpus,
    params=FolderCorpusParams,
    summary="the files of a folder, one document each",
)
