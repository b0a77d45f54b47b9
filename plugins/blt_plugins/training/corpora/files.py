"""Finding the files of a corpus."""

from __future__ import annotations

import contextlib
import glob
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blt_core.errors import DataError
from blt_core.files import is_dross
from blt_core.storage.texts import visible_names
from blt_plugins.training.corpora.sources import (
    Files,
    LocalFiles,
    RemoteFiles,
    file_system,
    url_error,
)
from blt_plugins.training.corpora.urls import is_url, shown

#: The folder, within that of a corpus, where its index is kept. Nothing in it is a document.
INDEX_FOLDER = ".blt-index"

_MAGIC = frozenset("*?[")


def find_files(folder: str, pattern: str, options: Mapping[str, Any]) -> Files:
    """The files below ``folder`` that match, in an order that is the same on every machine."""
    if is_url(folder):
        return _find_remote(folder, pattern, options)
    place = Path(folder)
    if not place.is_dir():
        what = "is not a folder" if place.exists() else "no such folder"
        raise DataError(f"{place}: {what}; corpus.path (or --corpus) names a folder of text files")
    try:
        found = visible_names(place, pattern)
    except (ValueError, NotImplementedError) as error:
        text = f"corpus.pattern: {pattern!r} is no glob below a folder: {error}"
        raise DataError(text) from error
    top = "" if str(place) == "." else os.path.join(place, "")  # noqa: PTH118 -- a million texts
    files = [top + name for name in found if INDEX_FOLDER not in name or not _is_ours(name)]
    if not files:
        raise DataError(f"{folder}: no file matches {pattern!r} (corpus.pattern)")
    return LocalFiles(files, str(place), pattern)


def match_files(path: str, example: str, options: Mapping[str, Any]) -> Files:
    """The file ``path``, or those that it matches as a glob (``**`` for any depth), sorted.

    Raises DataError if there is none. example: a pattern of the files that are wanted. options: of
    the file system, for a URL.
    """
    if is_url(path):
        return _match_remote(path, example, options)
    if Path(path).is_file():
        return LocalFiles([str(Path(path))], str(Path(path).parent), Path(path).name)
    if Path(path).is_dir():
        raise _is_folder(path, str(Path(path) / example))
    found = sorted(Path(each) for each in glob.glob(path, recursive=True))  # noqa: PTH207 -- may be absolute
    files = [str(each) for each in found if not is_dross(each.name) and each.is_file()]
    files = [name for name in files if not _is_ours(name)]
    if not files:
        raise _no_file(path)
    root, pattern = _fixed(Path(path).as_posix())
    return LocalFiles(files, str(Path(root)), pattern)


def has_folders(path: str, names: tuple[str, ...], options: Mapping[str, Any]) -> bool:
    """Whether a folder, here or behind a URL, has folders of all these names."""
    if not is_url(path):
        return all((Path(path) / name).is_dir() for name in names)
    system, place = file_system(path, options)
    try:
        return all(system.isdir(posixpath.join(place, name)) for name in names)
    except Exception as error:
        raise url_error(path, error) from error


def below(folder: str, name: str) -> str:
    """The path or URL of what is called ``name`` in a folder."""
    return posixpath.join(folder, name) if is_url(folder) else str(Path(folder) / name)


def _match_remote(url: str, example: str, options: Mapping[str, Any]) -> Files:
    with _listing(url, options) as (system, path):
        if _is_file(system, path):
            folder, _, name = path.rpartition("/")
            return _remote([path], system, folder, name, url, options)
        if _MAGIC.isdisjoint(path):
            raise _is_folder(url, below(url, example)) if system.isdir(path) else _no_file(url)
        found = _visible(system, system.glob(path, detail=True), path)
        if not found:
            raise _no_file(url)
        return _remote(found, system, *_fixed(path), url, options)


def _find_remote(url: str, pattern: str, options: Mapping[str, Any]) -> Files:
    with _listing(url, options) as (system, path):
        if not system.isdir(path):
            raise DataError(
                f"{shown(url)}: no such folder; corpus.path names a folder of text files"
            )
        whole = posixpath.join(path, pattern)
        found = _visible(system, system.glob(whole, detail=True), whole)
        if not found:
            raise DataError(f"{shown(url)}: no file matches {pattern!r} (corpus.pattern)")
        return _remote(found, system, path, pattern, url, options)


@contextlib.contextmanager
def _listing(url: str, options: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """The file system of a URL, and the path in it. Raises DataError, with the URL."""
    system, path = file_system(url, options)
    try:
        system.invalidate_cache()  # another corpus of this process may have listed it before
        yield system, path
    except DataError:
        raise
    except Exception as error:
        raise url_error(url, error) from error


def _remote(
    found: Sequence[str],
    system: Any,
    root: str,
    pattern: str,
    url: str,
    options: Mapping[str, Any],
) -> Files:
    whole = system.unstrip_protocol
    return RemoteFiles([whole(name) for name in found], whole(root), pattern, url, options, system)


def _is_file(system: Any, path: str) -> bool:
    """Whether there is such a file; over HTTP ``isfile`` would begin to download it."""
    try:
        return _holds_bytes(system, path, system.info(path)["type"])
    except FileNotFoundError:
        return False


def _visible(system: Any, found: Mapping[str, Mapping[str, Any]], pattern: str) -> list[str]:
    """The files of a listing, in the order of the parts of their paths, as those of this machine.

    Hidden ones only where the glob names something hidden.
    """
    shows, (fixed, _) = "/." in pattern, _fixed(pattern)
    names = [
        name
        for name, info in found.items()
        if not is_dross(posixpath.basename(name))
        and (shows or "/." not in name.removeprefix(fixed))
        and not _is_ours(name)
        and _holds_bytes(system, name, info.get("type"))
    ]
    return sorted(names, key=lambda name: name.split("/"))


def _holds_bytes(system: Any, name: str, kind: str | None) -> bool:
    """Whether it is a file, or a link to one, which systems call by several names."""
    return kind == "file" or (kind != "directory" and bool(system.isfile(name)))


def _fixed(pattern: str) -> tuple[str, str]:
    """The folder above the first part of a glob that is no plain name, and the rest."""
    parts = pattern.split("/")
    plain = next((i for i, part in enumerate(parts) if not _MAGIC.isdisjoint(part)), len(parts) - 1)
    root = "/".join(parts[:plain]) or ("/" if pattern.startswith("/") else "")
    return root, "/".join(parts[plain:])


def _is_ours(name: str) -> bool:
    return INDEX_FOLDER in Path(name).parts


def _is_folder(path: str, fix: str) -> DataError:
    return DataError(
        f"{shown(path)}: is a folder; name its files by a glob, as in corpus.path = '{shown(fix)}'"
    )


def _no_file(path: str) -> DataError:
    return DataError(f"{shown(path)}: no such file, and no file matches it as a glob")
