"""Compressed files, decompressed once into the cache folder, so that any place can be read."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from blt_core.errors import DataError
from blt_core.storage.folders import cache_folder, replace_file
from blt_plugins.training.corpora.cache import alone_with, make_private
from blt_plugins.training.corpora.sources import UNSETTLED, Files, Stamp, Stamps, check_end
from blt_plugins.training.corpora.unwanted import check_wanted
from blt_plugins.training.corpora.urls import hash_of, is_url, shown

#: Seconds after which a copy that nobody has used is removed when another one is made.
UNUSED = 30 * 24 * 3600
_CHUNK = 1 << 20
#: How often a copy is made that other processes remove, each of them once.
_TRIES = 9
_FOLDER = "decompressed"
_DAMAGES = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, ValueError)

#: By the ends of names.
_OPENERS: Mapping[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda file: _open_zstd(file),  # noqa: PLW0108 -- it stands below
}


def is_compressed(name: str) -> bool:
    """Whether a file is compressed, by its name."""
    return _suffix(name) in _OPENERS


def _suffix(name: str) -> str:
    return Path(name.partition("?")[0] if is_url(name) else name).suffix.lower()


class Decompressed:
    """Other files, of which the compressed ones are read as their decompressed copies.

    Sizes and versions are those of the compressed files, of which the copies are kept by version.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self.names, self.root, self.pattern = files.names, files.root, files.pattern
        self.url, self.options, self.shared = files.url, files.options, files.shared
        self._copies: dict[int, Path] = {}

    def label(self, number: int) -> str:
        """The name below the root."""
        return self._files.label(number)

    def stamp(self, number: int) -> Stamp:
        """Of the file as it is stored."""
        return self._files.stamp(number)

    def errors(self, number: int) -> AbstractContextManager[None]:
        """As of the file that is stored."""
        return self._files.errors(number)

    @contextmanager
    def opened(self, number: int, *, in_order: bool = False) -> Iterator[BinaryIO]:
        """The file, or its decompressed copy."""
        if not is_compressed(self.names[number]):
            with self._files.opened(number, in_order=in_order) as file:
                yield file
            return
        for _ in range(_TRIES):  # another run may remove a copy, as each process of this one may
            path = self._copy(number)
            with suppress(FileNotFoundError), path.open("rb") as file:
                yield file
                return
            del self._copies[number]
        raise DataError(f"{path}: removed as soon as it was made; run the same command again")

    def held(self, number: int) -> BinaryIO:
        """The compressed file itself."""
        return self._files.held(number)

    def lacking(self, stamps: Stamps) -> Sequence[int]:
        """The compressed files without a copy."""
        packed = [n for n, name in enumerate(self.names) if is_compressed(name)]
        paths = [self._path(n, cast("Stamp", tuple(stamps[n].tolist()))) for n in packed]
        return [n for n, path in zip(packed, paths, strict=True) if not path.is_file()]

    def forget(self, numbers: Iterable[int]) -> None:
        """Remove the copies of some files."""
        for number in numbers:
            if not is_compressed(self.names[number]):
                self._files.forget([number])
                continue
            path = self._copies.pop(number, None)
            with suppress(OSError, DataError):  # of a file that is gone
                (path or self._path(number, self.stamp(number))).unlink(missing_ok=True)

    def _path(self, number: int, stamp: Stamp) -> Path:
        """Where the copy of a version lies."""
        name = self.names[number]
        where = str(Path(name).resolve())
        if self.url is not None:
            where = f"{shown(self.url)} {name}"  # the name does not tell an archive, nor its host
        return cache_folder() / _FOLDER / hash_of(f"{where} {stamp}")[:32]

    def _copy(self, number: int) -> Path:
        """The decompressed copy, which is made if it is not there."""
        if number not in self._copies:
            stamp = self.stamp(number)
            path = self._path(number, stamp)
            if stamp[2] == UNSETTLED or not _touched(path):
                self._make(number, path, stamp)
            self._copies[number] = path
        return self._copies[number]

    def _make(self, number: int, path: Path, stamp: Stamp) -> None:
        name = shown(self.names[number])
        with _writing(path, name):
            make_private(path.parent)
        with alone_with(path, f"decompresses {name}"):
            if stamp[2] != UNSETTLED and _touched(path):
                return  # made by another process while this one waited
            _remove_unused(path)
            with _writing(path, name), replace_file(path) as copy:
                for data in self._decompressed(number):
                    copy.write(data)
        if self.stamp(number)[:2] != stamp[:2]:
            path.unlink(missing_ok=True)
            raise DataError(f"{name}: changed while it was decompressed; run the command again")

    def _decompressed(self, number: int) -> Iterator[bytes]:
        name = shown(self.names[number])
        with self._files.opened(number, in_order=True) as file:
            opened = _OPENERS[_suffix(self.names[number])](file)
            damages = (*_DAMAGES, *_zstd_errors())
            while True:
                check_wanted()
                try:
                    data = opened.read(_CHUNK)
                except damages as error:
                    raise _damaged(name, error) from error
                except OSError as error:
                    if error.errno is None and self.url is None:  # what bz2 raises for its data
                        raise _damaged(name, error) from error
                    raise
                if not data:
                    break
                yield data
            place = file.tell()
            if not file.read(1):  # else something stands behind the compressed text
                check_end(name, file, place)


def _damaged(name: str, error: Exception) -> DataError:
    return DataError(f"{name}: cannot be decompressed: {error}")


@contextmanager
def _writing(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}; {name} is to be decompressed there\n"
            "  fix: free space, or set XDG_CACHE_HOME to another folder, or decompress the file"
        ) from error


def _touched(path: Path) -> bool:
    """Whether a copy is there, which counts as used now."""
    try:
        os.utime(path)
    except OSError:
        return path.is_file()
    return True


def _remove_unused(copy: Path) -> None:
    """Remove what ended processes have left of a copy, and all that was not used for long."""
    before = time.time() - UNUSED
    for path in copy.parent.iterdir():
        with suppress(OSError):  # another process may remove it too, or read it
            if path.name.startswith(f".{copy.name}.new-") or path.stat().st_mtime < before:
                path.unlink()


class _Zstd:
    """The text of zstandard frames, one after the other."""

    def __init__(self, file: BinaryIO, begin: Callable[[], Any]) -> None:
        self._file, self._begin = file, begin
        self._frame: Any = None
        self._rest = b""

    def read(self, size: int) -> bytes:
        """Some text; none at the end. Raises EOFError if the last frame is cut off."""
        while data := self._rest or self._file.read(size):
            if self._frame is None:
                self._frame = self._begin()
            text: bytes = self._frame.decompress(data)
            self._rest = b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
            if text:
                return text
        if self._frame is not None:
            raise EOFError("it ends within a frame")
        return b""


def _zstd_errors() -> Iterator[type[Exception]]:
    """What modules that are loaded raise for damaged frames, which no class of Python's covers."""
    for name in ("compression.zstd", "zstandard"):
        if (module := sys.modules.get(name)) is not None:
            yield module.ZstdError


def _open_zstd(file: BinaryIO) -> Any:
    """As the others open it, by Python's own module where it has one."""
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        pass
    else:
        return zstd.ZstdFile(file)
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            "zstd files need zstandard.   fix: pip install zstandard, or use Python 3.14"
        ) from error
    return _Zstd(file, zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj)
