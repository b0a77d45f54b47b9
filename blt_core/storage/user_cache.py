"""The folder where a user's machine keeps what can be made again."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from blt_core.log import logger

NAME = "blt-core"


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/blt-core``, or where the system keeps the caches of users."""
    if own := os.environ.get("XDG_CACHE_HOME"):
        return Path(own) / NAME
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / NAME / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / NAME
    return Path.home() / ".cache" / NAME


def make_private(folder: Path) -> None:
    """Make a folder of the cache that only its user may read: texts, and what is known of them.

    Raises OSError where it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # another user's
        folder.chmod(0o700)


def open_to_others(path: Path) -> Path | None:
    """Of a file in a folder of the cache and the folders around it: the first that is not safe.

    That is one which is not this user's, or which others may write to. Code is loaded from safe
    ones alone. Raises OSError where one cannot be asked.
    """
    if not hasattr(os, "geteuid"):
        return None
    for each in (path, path.parent, path.parent.parent):
        found = each.lstat()
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return each
    return None


@contextlib.contextmanager
def alone_with(path: Path, what: str) -> Iterator[None]:
    """Wait until no other process is in such a block for ``path``, where the system has locks.

    The lock is a file beside ``path``, whose folder is there; it stays, and is free when its
    process ends. what: what the others do, in messages.
    """
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without the right to write it, as without locks
            file = stack.enter_context(lock.open("ab"))
            os.utime(lock)  # a lock that is in use is none that was left long ago
            _wait_for(file.fileno(), path, what)
        yield  # closing the file lets the lock go


def _wait_for(file: int, path: Path, what: str) -> None:
    try:
        import fcntl
    except ImportError:
        return  # both may make it: each puts a whole file in its place
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger().info("waiting", path=str(path), reason=f"another process {what}")
        fcntl.flock(file, fcntl.LOCK_EX)
