"""Files that hold texts: which of a folder's are meant, and their bytes."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from blt_core.errors import DataError
from blt_core.files import is_dross, is_lfs_pointer, stand_in

#: Git-LFS takes no longer file for a pointer; a text about them may begin as one.
_LONGEST_POINTER = 1024


def visible_files(folder: Path, pattern: str = "**/*") -> list[Path]:
    """The files below ``folder`` that match, sorted; hidden ones only where the pattern names them.

    Raises ValueError or NotImplementedError for what is no glob below a folder.
    """
    return [folder / name for name in visible_names(folder, pattern)]


def visible_names(folder: Path, pattern: str = "**/*") -> list[str]:
    """As ``visible_files``, the paths below ``folder`` as texts: quick for a million files."""
    shown = [part for part in Path(pattern).parts if _is_hidden(part)]
    name = None if shown else _anywhere(pattern)
    if name is not None:
        flags = re.IGNORECASE if os.name == "nt" else 0
        return list(_walk(str(folder), "", re.compile(fnmatch.translate(name), flags)))
    found = [path.relative_to(folder) for path in folder.glob(pattern) if _is_file(path)]
    files = [path for path in found if not _hides(path, shown)]
    return [str(path) for path in sorted(files, key=lambda path: path.parts)]


def _anywhere(pattern: str) -> str | None:
    """The glob of names that a pattern looks for in all folders, if that is all it says."""
    anywhere, _, name = pattern.partition("/")
    plain = anywhere == "**" and name not in {"", ".", "..", "**"}
    return name if plain and not {"/", os.sep, os.altsep} & set(name) else None


def _walk(folder: str, below: str, wanted: re.Pattern[str]) -> Iterator[str]:
    """The files in ``folder`` and in what it holds and does not hide; links are not followed.

    below: what its path adds to that where the walk began, with a separator at its end. In the
    order of the parts of paths.
    """
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError:  # as if it were empty, as for a glob
        return
    for entry in entries:
        if _is_hidden(entry.name):
            continue
        if _is_folder(entry):
            yield from _walk(entry.path, f"{below}{entry.name}{os.sep}", wanted)
        elif wanted.match(entry.name) and _is_file(entry):
            yield below + entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _is_file(entry: os.DirEntry[str] | Path) -> bool:
    """Whether it leads to a file; a link may lead in circles, or through what is no folder."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _hides(path: Path, shown: Sequence[str]) -> bool:
    """Whether a part of ``path`` is hidden and matches none of the globs ``shown``."""
    hidden = [part for part in path.parts if _is_hidden(part)]
    return not all(any(fnmatch.fnmatchcase(part, glob) for glob in shown) for part in hidden)


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__" or is_dross(part)


def read_document(path: Path) -> bytes:
    """A file's bytes; DataError if it cannot be read, or is a Git-LFS pointer to the text."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return check_document(str(path), data)


def check_document(name: str, data: bytes) -> bytes:
    """``data``, if it is a text; DataError if it is a Git-LFS pointer to it. name: of the file."""
    if is_lfs_pointer(data) and len(data) < _LONGEST_POINTER:
        raise DataError(f"{name}: {stand_in(data)}")
    return data
