"""Finding and reading the files of a corpus."""

from __future__ import annotations

import glob
from pathlib import Path

from blt_core.errors import DataError
from blt_core.files import is_dross
from blt_core.storage.texts import visible_files


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
