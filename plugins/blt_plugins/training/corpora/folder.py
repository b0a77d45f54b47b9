"""The corpus of a folder: one document a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs

from blt_core.component import BuildContext, Component, between
from blt_core.files import expand_home
from blt_core.storage.texts import read_document
from blt_plugins.training.corpora.files import find_files
from blt_plugins.training.corpora.stored import StoredCorpus


@attrs.frozen(kw_only=True)
class FolderCorpusParams:
    """path: the folder (relative: to the working directory). pattern: a glob, ** for any depth.

    Hidden files and folders (and ``__pycache__``, ``Thumbs.db``) are taken only where the pattern
    names them.
    valid_path: a folder of held-out files. Without it, ``train`` and ``valid`` below ``path`` are
    used if both exist; else about ``valid_percent`` of the files are held out, by their content.
    valid_percent: how many of the files are held out where nothing else says it.
    """

    path: str = attrs.field(converter=expand_home)
    pattern: str = "**/*"
    valid_path: str | None = attrs.field(
        default=None, converter=attrs.converters.optional(expand_home)
    )
    valid_percent: float = attrs.field(default=5.0, validator=between(0, 50))


class FileReader:
    """The files of a folder, in sorted order; a document's place is always 0 in its file."""

    def __init__(self, folder: Path, pattern: str) -> None:
        self.files = find_files(folder, pattern)
        self._folder = folder

    def scan(self) -> Iterator[tuple[int, int, bytes]]:
        """(file, place, text) of all documents."""
        for number, path in enumerate(self.files):
            yield number, 0, read_document(path)

    def read(self, file: int, place: int) -> bytes:
        """The text of one document."""
        return read_document(self.files[file])

    def name(self, file: int, place: int) -> str:
        """The file's path within the folder."""
        return self.files[file].relative_to(self._folder).as_posix()


class FolderCorpus(StoredCorpus):
    """Raises DataError, when it is made, if a folder is missing or holds no such file."""

    def __init__(self, params: FolderCorpusParams, context: BuildContext) -> None:
        path = train = Path(params.path)
        valid = Path(params.valid_path) if params.valid_path is not None else None
        if valid is None and (path / "train").is_dir() and (path / "valid").is_dir():
            train, valid = path / "train", path / "valid"
        super().__init__(
            FileReader(train, params.pattern),
            FileReader(valid, params.pattern) if valid is not None else None,
            params.valid_percent,
        )


FOLDER_CORPUS = Component(
    kind="corpus",
    name="folder",
    factory=FolderCorpus,
    params=FolderCorpusParams,
    summary="the files of a folder, one document each",
)
