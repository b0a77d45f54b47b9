"""Files that hold texts: which of a folder's are meant, and their bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from blt_core.errors import DataError
from blt_core.files import is_dross, is_lfs_pointer, stand_in

#: Git-LFS takes no longer file for a pointer; a text about them may begin as one.
_LONGEST_POINTER = 1024


def visible_files(folder: Path, pattern: str = "**/*") -> list[Path]:
    """The files below ``folder`` that match, sorted; hidden ones only where the pattern names them.

    Raises ValueError or NotImplementedError for what is no glob below a folder.
    """
    shown = [part for part in Path(pattern).parts if _is_hidden(part)]
    found = [path for path in _matches(folder, pattern, shown) if path.is_file()]
    files = [path for path in found if not _hides(path.relative_to(folder), shown)]
    return sorted(files, key=lambda path: path.relative_to(folder).parts)


def _matches(folder: Path, pattern: str, shown: Sequence[str]) -> Iterable[Path]:
    """What is below ``folder`` and matches; without most of what is hidden, as an environment."""
    anywhere, _, name = pattern.partition("/")
    if shown or anywhere != "**" or not name.strip("/") or name.startswith("/"):
        return folder.glob(pattern)
    return {path for each in _visible_folders(folder) for path in each.glob(name)}


def _visible_folders(folder: Path) -> Iterator[Path]:
    """``folder`` and what is below and not hidden; links are not followed, nor does ``**``."""
    for path, names, _ in os.walk(folder):
        names[:] = [name for name in names if not _is_hidden(name)]
        yield Path(path)


def _hides(path: Path, shown: Sequence[str]) -> bool:
    """Whether a part of ``path`` is hidden and matches none of the globs ``shown``."""
    hidden = [part for part in path.parts if _is_hidden(part)]
    return not all(any(fnmatchcase(part, glob) for glob in shown) for part in hidden)


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__" or is_dross(part)


def read_document(path: Path) -> bytes:
    """A file's bytes; DataError if it cannot be read, or is a Git-LFS pointer to the text."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if is_lfs_pointer(data) and len(data) < _LONGEST_POINTER:
        raise DataError(f"{path}: {stand_in(data)}")
    return data
