"""Folders of files that are replaced whole: at any moment the old or the new one is complete."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from blt_core.errors import BltError, DataError, RunError
from blt_core.files import names_in

#: What a checkpoint folder holds; a folder without one of them is none, and is never replaced.
CONFIG = "config.toml"
TENSORS = "model.safetensors"
MODEL_FILES = (CONFIG, TENSORS)

#: Of the package, in the folder that a system keeps for the caches of its users.
_NAME = "blt-core"


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/blt-core``, or where the system keeps the caches of users."""
    if own := os.environ.get("XDG_CACHE_HOME"):
        return Path(own) / _NAME
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / _NAME / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / _NAME
    return Path.home() / ".cache" / _NAME


@contextlib.contextmanager
def replace_folder(
    target: Path, files: Collection[str], marks: Collection[str] | None = None
) -> Iterator[Path]:
    """A temporary sibling folder that takes the place of ``target`` if the block succeeds.

    files: the names that the block writes. marks: those that a folder must hold to be replaced, and
    that go with it (default: files). What else lies in the old folder is kept. At every moment the
    old or the new content is complete on the disk: where the name itself is missing for an instant,
    :func:`current_folder` finds the old content under its spare name. Raises DataError
    as :func:`check_replaceable` does, RunError if a file cannot be written.
    """
    marks = files if marks is None else marks
    check_replaceable(target, marks)
    target = _real(target)
    fresh = _temporary(target)
    with file_errors(target, RunError):
        try:
            fresh.mkdir(parents=True)
            yield fresh
            # Some writers keep files to the user alone; the folder's mode is what was asked for.
            mode = fresh.stat().st_mode & 0o666
            for path in fresh.iterdir():
                path.chmod(mode)
            _carry(current_folder(target), fresh, {*files, *marks})
            flush_all(fresh)
            _swap(fresh, target)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise


def check_replaceable(target: Path, files: Collection[str]) -> None:
    """Raise DataError if something has the name ``target`` that :func:`replace_folder` must leave.

    It replaces a folder that holds all of ``files``, or nothing but what systems and editors leave.
    """
    real = _real(target)
    for found in (real, _spare(real)):
        with file_errors(found, DataError):
            names = names_in(found)
        if names and not names.issuperset(files):
            raise DataError(
                f"{found}: not replaced, since it is no folder with {' and '.join(files)}\n"
                "  fix: move it away, or write to another place"
            )


def current_folder(target: Path) -> Path:
    """``target``, or its old content if a replacement was cut short between its two renames.

    Raises DataError for a path that the system cannot look up.
    """
    with file_errors(target, DataError):
        spare = _spare(_real(target))
        return spare if not target.exists() and spare.is_dir() else target


@contextlib.contextmanager
def replace_file(target: Path) -> Iterator[BinaryIO]:
    """A temporary sibling file that takes the place of ``target`` if the block succeeds."""
    fresh = _temporary(target)
    try:
        with fresh.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(target)
        flush(target.parent)
    finally:
        fresh.unlink(missing_ok=True)


def lock(file: BinaryIO, path: Path) -> None:
    """Keep other processes out, where the system can; DataError if one is in there."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"{path}: another run writes here; choose another output") from error
    except OSError:  # a file system without locks
        return


@contextlib.contextmanager
def file_errors(path: Path, kind: type[BltError]) -> Iterator[None]:
    """Raise ``kind``, naming ``path``, for what goes wrong with files in the block."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise kind(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _carry(old: Path, fresh: Path, files: Collection[str]) -> None:
    """Copy what a folder holds beside ``files``."""
    for path in old.iterdir() if old.is_dir() else ():
        # NFS names so a removed file that is still open: a copy would stay for ever.
        if path.name in files or path.name.startswith(".nfs"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, fresh / path.name, symlinks=True)
        else:
            shutil.copy2(path, fresh / path.name, follow_symlinks=False)


def _swap(fresh: Path, target: Path) -> None:
    spare = _spare(target)
    if target.exists():
        _discard(spare)
        target.rename(spare)
    fresh.rename(target)
    flush(target.parent)
    _discard(spare)


def _discard(folder: Path) -> None:
    """Remove a folder, if it is there; it loses its name first, so that no half of it is found."""
    if folder.exists():
        shutil.rmtree(folder.rename(_temporary(folder)), ignore_errors=True)


def _real(target: Path) -> Path:
    """The folder that a path leads to, by its own name: links and dots are followed."""
    return Path(os.path.realpath(target))


def _spare(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _temporary(target: Path) -> Path:
    return target.parent / f".{target.name}.new-{secrets.token_hex(4)}"


def flush_all(folder: Path) -> None:
    """Flush all that a folder holds, and the folder."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            flush(path)


def flush(path: Path) -> None:
    """Have the file system write ``path`` out; without it a power cut may leave empty files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
