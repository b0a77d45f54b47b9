"""The corpus of a folder: one document a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import attrs

from blt_core.component import BuildContext, Component, between
from blt_core.errors import DataError

Split = Literal["train", "valid"]


@attrs.frozen(kw_only=True)
class FolderCorpusParams:
    """path: the folder (relative: to the working directory). pattern: a glob, ** for any depth.

    Hidden files and folders (and ``__pycache__``) are taken only where the pattern names them.
    valid_path: a folder of held-out files. Without it, ``train`` and ``valid`` below ``path`` are
    used if both exist; else about ``valid_percent`` of the files are held out, by their content.
    """

    path: str
    pattern: str = "**/*"
    valid_path: str | None = None
    valid_percent: float = attrs.field(default=5.0, validator=between(0, 50))


class FolderCorpus:
    """Files in sorted order, as bytes. Empty files are skipped.

    Raises DataError, when it is made, if a folder is missing or holds no matching file.
    """

    def __init__(self, params: FolderCorpusParams, context: BuildContext) -> None:
        path, self._percent = Path(params.path), params.valid_percent
        train, valid = path, Path(params.valid_path) if params.valid_path is not None else None
        if valid is None and (path / "train").is_dir() and (path / "valid").is_dir():
            train, valid = path / "train", path / "valid"
        self._train = find_files(train, params.pattern)
        self._valid = find_files(valid, params.pattern) if valid is not None else None

    def documents(self, split: Split) -> Iterator[bytes]:
        """The documents of one split. Raises DataError for a file that cannot be read."""
        own = self._valid if split == "valid" else None
        cut = self._cut() if self._valid is None else None
        for path in own or self._train:
            text = read_document(path)
            if text and (cut is None or (_digest(text) < cut) == (split == "valid")):
                yield text

    def _cut(self) -> bytes:
        """Documents with a smaller digest are held out: of two and more at least one.

        By content, so that copies of one file never lie on both sides.
        """
        digests = sorted(_digest(text) for path in self._train if (text := read_document(path)))
        share = len(digests) * self._percent / 100
        count = min(max(round(share), 1), len(digests) - 1) if share else 0
        return digests[count] if digests else b""


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def find_files(folder: Path, pattern: str) -> list[Path]:
    """The files below ``folder`` that match, in an order that is the same on every machine."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {what}; corpus.path (or --corpus) names a folder of text files")
    try:
        files = visible_files(folder, pattern)
    except (ValueError, NotImplementedError) as error:
        text = f"corpus.pattern: {pattern!r} is no glob below a folder: {error}"
        raise DataError(text) from error
    if not files:
        raise DataError(f"{folder}: no file matches {pattern!r} (corpus.pattern)")
    return files


def visible_files(folder: Path, pattern: str = "**/*") -> list[Path]:
    """The files below ``folder`` that match, sorted; hidden ones only where the pattern names them.

    Raises ValueError or NotImplementedError for what is no glob below a folder.
    """
    found = [path for path in folder.glob(pattern) if path.is_file()]
    shown = [part for part in Path(pattern).parts if _is_hidden(part)]
    files = [path for path in found if not _hides(path.relative_to(folder), shown)]
    return sorted(files, key=lambda path: path.relative_to(folder).parts)


def _hides(path: Path, shown: Sequence[str]) -> bool:
    """Whether a part of ``path`` is hidden and matches none of the globs ``shown``."""
    hidden = [part for part in path.parts if _is_hidden(part)]
    return not all(any(fnmatchcase(part, glob) for glob in shown) for part in hidden)


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__"


def read_document(path: Path) -> bytes:
    """A file's bytes; DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


FOLDER_CORPUS = Component(
    kind="corpus",
    name="folder",
    factory=FolderCorpus,
    params=FolderCorpusParams,
    summary="the files of a folder, one document each",
)
