"""Reading files that others wrote: text, JSON, and what lies where a file or folder is expected.

Nothing here knows what a file is for. Functions raise ValueError with what was found and the fix;
callers add the place.
"""

from __future__ import annotations

import codecs
import fnmatch
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: Deeper values would exhaust Python's stack somewhere between here and a built component.
DEEPEST = 50
TOO_DEEP = f"nested more than {DEEPEST} levels deep"
#: Bytes that tell what a file is.
_BEGINNING = 200

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_HTML = (b"<!doctype html", b"<html")
#: UTF-32 first: its mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

#: Files that operating systems and network file systems leave anywhere, on their own.
_DROSS = (".DS_Store", "._*", "Thumbs.db", "desktop.ini", ".directory", ".nfs*")
_IS_DROSS = re.compile("|".join(map(fnmatch.translate, _DROSS)))
#: What editors keep beside a file: backups, and edits that are not saved yet.
_OF_EDITORS = ("*~", ".*.sw?", "#*#", ".#*")


# -- contents ------------------------------------------------------------------------------------


def stand_in(beginning: bytes) -> str | None:
    """Say what a file is that was stored in the place of the one that is wanted, with the fix.

    None for a file that begins as neither a Git-LFS pointer nor an HTML page does.
    """
    if is_lfs_pointer(beginning):
        return "a Git-LFS pointer, not the file that it stands for; fetch that with: git lfs pull"
    if beginning[:_BEGINNING].lstrip().lower().startswith(_HTML):
        return (
            "an HTML page, not the file itself; download it again, from an address that gives "
            "the file"
        )
    return None


def is_lfs_pointer(beginning: bytes) -> bool:
    """Whether a file begins as a Git-LFS pointer does."""
    return beginning.startswith(_LFS_POINTER)


def stand_in_at(path: Path) -> str | None:
    """Say as ``stand_in`` does what the file ``path`` is. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return stand_in(file.read(_BEGINNING))


def decode(data: bytes) -> str:
    """The text of UTF-8 bytes, without a byte order mark; ValueError for others."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = f"not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8"
        raise ValueError(explain(data) or text) from error


def explain(data: bytes) -> str | None:
    """Say why the bytes of a file are no text of the expected kind, if they tell; with the fix."""
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if encoding is None and b"\0" in data[:4]:
        encoding = "UTF-16 or UTF-32"  # ASCII characters in them, without a mark
    return f"{encoding} text, not UTF-8; save it as UTF-8" if encoding else stand_in(data)


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8; ValueError for all that cannot be read."""
    text = decode(data).rstrip()
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text else ""
        reason = f"not valid JSON: {error.msg} at {line}column {error.colno}"
        raise ValueError(explain(data) or reason) from error
    except ValueError as error:
        raise ValueError("not read: an integer has too many digits") from error
    except RecursionError as error:
        raise ValueError("not read: nested too deeply") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises OSError, and ValueError for all that cannot be read."""
    value = parse_json(path.read_bytes())
    check_depth(value)
    return value


def check_depth(value: object) -> None:
    """Raise ValueError for tables and lists that are nested too deeply to be worked with."""
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [item for each in level for item in _below(each)]
    if level:
        raise ValueError(TOO_DEEP)


def _below(value: object) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def to_json(value: object) -> str:
    """A value as one line of JSON in ASCII; floats that JSON cannot spell become ``null``."""
    return json.dumps(_spelt(value), allow_nan=False)


def _spelt(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _spelt(item) for key, item in value.items()}
    return [_spelt(item) for item in value] if isinstance(value, (list, tuple)) else value


# -- names ---------------------------------------------------------------------------------------


def is_dross(name: str) -> bool:
    """Whether a file of this name is left by a system, as ``.DS_Store`` is, and nobody's work."""
    return _IS_DROSS.match(name) is not None


def is_stray(name: str) -> bool:
    """Whether a file of this name says nothing of its folder: dross, and what editors keep.

    What editors keep may be somebody's work: it is looked past, and never removed.
    """
    return is_dross(name) or any(fnmatch.fnmatchcase(name, each) for each in _OF_EDITORS)


def names_in(folder: Path) -> set[str]:
    """The names of what a folder holds, strays aside; none if there is no such folder.

    Raises OSError for what is no folder, or cannot be listed.
    """
    return {p.name for p in folder.iterdir() if not is_stray(p.name)} if folder.exists() else set()


def expand_home(path: str) -> str:
    """A path with ``~`` and ``~user`` at its beginning replaced by that home, if it is known."""
    return os.path.expanduser(path)  # noqa: PTH111 -- pathlib's raises for a home that is unknown
