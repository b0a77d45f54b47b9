"""Finding and reading the files of a corpus."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from blt_core.errors import DataError
from blt_core.files import is_dross, is_lfs_pointer, stand_in

#: Git-LFS takes no longer file for a pointer; a text about them may begin as one.
_LONGEST_POINTER = 1024


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
    return part.startswith(".") or part == "__pycache__" or is_dross(part)


def match_files(path: str, example: str) -> list[Path]:
    """The file ``path``, or those that it matches as a glob (``**`` for any depth), sorted.

    Raises DataError if there is none. example: a pattern of the files that are wanted.
    """
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        fix = Path(path) / example
        raise DataError(
            f"{path}: is a folder; name its files by a glob, as in corpus.path = '{fix}'"
        )
    found = sorted(Path(each) for each in glob.glob(path, recursive=True))  # noqa: PTH207 -- may be absolute
    files = [each for each in found if each.is_file() and not is_dross(each.name)]
    if not files:
        raise DataError(f"{path}: no such file, and no file matches it as a glob")
    return files


def read_document(path: Path) -> bytes:
    """A file's bytes; DataError if it cannot be read, or is a Git-LFS pointer to the text."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if is_lfs_pointer(data) and len(data) < _LONGEST_POINTER:
        raise DataError(f"{path}: {stand_in(data)}")
    return data
