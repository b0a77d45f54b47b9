"""The files of a corpus: on this machine, or behind URLs that fsspec reads.

Axes: f files.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import email.utils
import hashlib
import io
import os
import sys
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import numpy.typing as npt

from blt_core.errors import BltError, DataError
from blt_core.storage.folders import file_errors
from blt_plugins.training.corpora.urls import hash_of, shown

#: Size in bytes, and two numbers that change with the contents.
Stamp = tuple[int, int, int]
#: int64 (f, 3): those of all files.
Stamps = npt.NDArray[np.int64]
#: Nanoseconds after which a change of a file surely shows in its times: no clock is coarser.
SETTLED = 2_000_000_000
#: The third number of a file that may still change unseen.
UNSETTLED = -1

#: Bytes that are read at a time from a URL: in order, and here and there.
_AHEAD, _BLOCK = 1 << 23, 1 << 18
#: Files behind URLs that stay open, and blocks of each that stay in memory.
_OPEN, _BLOCKS = 16, 32
#: What pip installs for a protocol that fsspec knows and does not bring.
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
#: What file systems tell of a file's version: what changes with each,
_VERSION = frozenset(
    {
        "etag",
        "content-md5",
        "digest",
        "md5",
        "md5hash",
        "crc",
        "crc32c",
        "chksum",
        "sha",
        "sha256",
        "blob_id",
        "oid",
        "generation",
        "version_id",
        "versionid",
    }
)
#: and times, by the second or finer.
_TIMES = frozenset(
    {
        "last-modified",
        "last_modified",
        "lastmodified",
        "modified",
        "modificationtime",
        "mtime",
        "modify",
        "updated",
        "created",
        "timecreated",
        "date_time",
    }
)


class Files(Protocol):
    """Some files, by their numbers.

    names: as messages call them, and as they are found again. root: the folder that holds all of
    them, on this machine or as a URL. pattern: the glob below it that they match. url, options:
    how fsspec finds their file system; None for files of this machine. shared: whether other
    processes can read them.
    """

    names: Sequence[str]
    root: str
    pattern: str
    url: str | None
    options: Mapping[str, Any]
    shared: bool

    def label(self, number: int) -> str:
        """The name below ``root``, which stays the same where the folder is mounted elsewhere."""
        ...

    def stamp(self, number: int) -> Stamp:
        """Size and version. Raises DataError for a file that is gone."""
        ...

    def opened(self, number: int, *, in_order: bool = False) -> AbstractContextManager[BinaryIO]:
        """A file that can be read at any place; ``in_order``: from some place on, once."""
        ...

    def held(self, number: int) -> BinaryIO:
        """A file that a library keeps open, and reads in large pieces."""
        ...

    def errors(self, number: int) -> AbstractContextManager[None]:
        """Raise DataError, naming the file, for what goes wrong in reading it."""
        ...

    def lacking(self, stamps: Stamps) -> Sequence[int]:
        """The files of which something is to be made before a place of them can be read."""
        ...

    def forget(self, numbers: Iterable[int]) -> None:
        """Make that anew when it is needed."""
        ...


def labels_of(files: Files) -> list[str]:
    """What tells all files apart: the names below their root; of URLs, hashes of the names."""
    labels = [files.label(number) for number in range(len(files.names))]
    return labels if files.url is None else [hash_of(label)[:32] for label in labels]


def stamps_of(files: Files) -> Stamps:
    """Sizes and versions of all files, (f, 3). Raises DataError for one that is gone."""
    flat = array("q")
    for number in range(len(files.names)):
        flat.extend(files.stamp(number))
    return np.array(flat, dtype=np.int64).reshape(-1, 3)


class LocalFiles:
    """Files of this machine, opened whenever they are read."""

    url: str | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    shared = True

    def __init__(self, names: Sequence[str], root: str, pattern: str = "") -> None:
        self.names, self.root, self.pattern = names, root, pattern
        self._above = "" if root == "." else os.path.join(root, "")  # noqa: PTH118 -- a text

    def label(self, number: int) -> str:
        """The path below the root, with slashes."""
        return self.names[number].removeprefix(self._above).replace(os.sep, "/")

    def stamp(self, number: int) -> Stamp:
        """Size, and the times of the last changes of contents and inode, in nanoseconds.

        Nobody can set the second of these times back, as ``cp -p`` and ``rsync -t`` do the first.
        """
        name = self.names[number]
        try:
            status = os.stat(name)  # noqa: PTH116 -- a million paths, as texts
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {error.strerror}") from error
        # Windows' third time is that of creation.
        changed = status.st_mtime_ns if sys.platform == "win32" else status.st_ctime_ns
        settled = changed < time.time_ns() - SETTLED
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns if settled else UNSETTLED

    @contextlib.contextmanager
    def opened(self, number: int, *, in_order: bool = False) -> Iterator[BinaryIO]:
        """The file, until the end of the block."""
        with self.errors(number), Path(self.names[number]).open("rb") as file:
            yield file

    def held(self, number: int) -> BinaryIO:
        """The file, open."""
        return Path(self.names[number]).open("rb")

    def errors(self, number: int) -> AbstractContextManager[None]:
        """Raise DataError for what the system refuses."""
        return file_errors(Path(self.names[number]), DataError)

    def lacking(self, stamps: Stamps) -> Sequence[int]:
        """None: all are read as they are."""
        return ()

    def forget(self, numbers: Iterable[int]) -> None:
        """Nothing is kept of them."""


class RemoteFiles:
    """Files that fsspec reads, a few of which stay open, with blocks of them in memory."""

    def __init__(
        self,
        names: Sequence[str],
        root: str,
        pattern: str,
        url: str,
        options: Mapping[str, Any],
        system: Any = None,
    ) -> None:
        """system: the file system of ``url``, where it is at hand."""
        self.names, self.root, self.pattern = names, root, pattern
        self.url: str | None = url
        self.options = options
        self.shared = "memory://" not in url and options.get("target_protocol") != "memory"
        self._system = system or file_system(url, options)[0]
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def label(self, number: int) -> str:
        """The URL below the root."""
        return self.names[number].removeprefix(self.root).lstrip("/")

    def stamp(self, number: int) -> Stamp:
        """Size, and 126 bits of a hash of what the file system tells of versions.

        Where it tells nothing, of fsspec's ``ukey``, which some make of the URL alone.
        """
        name = self.names[number]
        with self.errors(number):
            info = self._system.info(name)
            told = {key.lower(): value for key, value in info.items() if value is not None}
            version = {key: str(told[key]) for key in sorted(told.keys() & (_VERSION | _TIMES))}
            if not version:
                version = {"ukey": str(self._system.ukey(name))}
        if info.get("size") is None:
            raise DataError(f"{shown(name)}: the server does not tell how many bytes it has")
        digest = hashlib.sha256(repr(version).encode()).digest()
        high, low = (int.from_bytes(digest[at : at + 8], "big") >> 1 for at in (0, 8))
        times = [told[key] for key in version.keys() & _TIMES]
        settled = bool(version.keys() - _TIMES) or not any(map(_is_recent, times))
        return int(info["size"]), high, low if settled else UNSETTLED

    @contextlib.contextmanager
    def opened(self, number: int, *, in_order: bool = False) -> Iterator[BinaryIO]:
        """The file; unless it is read in order it stays open for the next time."""
        with self.errors(number):
            if in_order:
                with self._reader(number, "readahead", _AHEAD) as file:
                    yield file
                return
            if number not in self._open:
                while len(self._open) >= _OPEN:
                    self._open.popitem(last=False)[1].close()
                self._open[number] = self._reader(
                    number, "blockcache", _BLOCK, cache_options={"maxblocks": _BLOCKS}
                )
            self._open.move_to_end(number)
            yield self._open[number]

    def held(self, number: int) -> BinaryIO:
        """The file, open, without a cache of its own."""
        with self.errors(number):
            return self._reader(number, "none", _BLOCK)

    @contextlib.contextmanager
    def errors(self, number: int) -> Iterator[None]:
        """Raise DataError, with the URL, for whatever a backend raises."""
        try:
            yield
        except BltError:
            raise
        except Exception as error:
            raise url_error(self.names[number], error) from error

    def lacking(self, stamps: Stamps) -> Sequence[int]:
        """None: all are read as they are."""
        return ()

    def forget(self, numbers: Iterable[int]) -> None:
        """What is in memory of them."""
        for number in numbers:
            if (file := self._open.pop(number, None)) is not None:
                file.close()

    def _reader(self, number: int, cache: str, block: int, **keys: Any) -> BinaryIO:
        name = self.names[number]
        file = self._system.open(name, "rb", block_size=block, cache_type=cache, **keys)
        if _is_stream(file):
            file.close()
            if self._system.info(name).get("size") == 0:  # HTTP gives no range of nothing
                return io.BytesIO()
            raise DataError(
                f"{shown(name)}: its server gives no ranges of bytes\n"
                "  fix: download it, and name the copy"
            )
        return cast(BinaryIO, io.BufferedReader(file, 1 << 16))


def _is_stream(file: Any) -> bool:
    """Whether a file cannot be read at any place. HTTP's streams say that they can."""
    return not file.seekable() or getattr(file, "size", 0) is None


def _is_recent(told: Any) -> bool:
    """Whether a time by the second is so near that another change may be told by the same time."""
    if isinstance(told, str):
        with contextlib.suppress(ValueError):
            told = dt.datetime.fromisoformat(told)
    try:
        if isinstance(told, str):
            told = email.utils.parsedate_to_datetime(told)
        seconds = told.timestamp() if isinstance(told, dt.datetime) else float(told)
    except (TypeError, ValueError):
        return False
    return seconds.is_integer() and abs(time.time() - seconds) * 1e9 < SETTLED


def check_end(name: str, stream: BinaryIO, place: int) -> None:
    """Raise DataError where a file ended at ``place``, before its end, as connections do."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(place)
    if size != place:
        raise DataError(
            f"{shown(name)}: its text ended at byte {place} of {size}\n"
            "  fix: run the same command again"
        )


def url_error(url: str, error: Exception) -> DataError:
    """What to raise for a URL that cannot be read."""
    reason = shown(str(error)).strip().splitlines()
    what = f"{type(error).__name__}: {reason[0]}" if reason else type(error).__name__
    return DataError(
        f"{shown(url)}: cannot be read: {what}\n"
        "  fix: run the same command again; how often a backend tries, and with which credentials, "
        "is said in corpus.storage_options or fsspec's own configuration"
    )


def file_system(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises DataError, with the command that installs it, if there is none.
    """
    try:
        import fsspec
    except ImportError as error:
        raise DataError(
            f"{shown(url)}: needs fsspec.   fix: pip install 'blt-core[data]'"
        ) from error
    protocol = url.split("://", 1)[0].rsplit("::", 1)[-1]
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        fix = f"pip install {package}" if package else str(error)
        raise DataError(
            f"{shown(url)}: needs a package that is not installed.   fix: {fix}"
        ) from error
    except Exception as error:
        raise url_error(url, error) from error
    return found
