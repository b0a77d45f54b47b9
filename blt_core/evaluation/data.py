"""What tasks read: records and lines, and prompts cut to what a model serves."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from blt_core.errors import DataError
from blt_core.files import decode, parse_json
from blt_core.storage.folders import file_errors

T = TypeVar("T")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without their ends; DataError if it cannot be read, or has none."""
    lines = _text(path).removesuffix("\n").split("\n")
    if lines == [""]:
        raise DataError(f"{path}: is empty")
    return [line.removesuffix("\r") for line in lines]


def read_records(path: Path, needs: Mapping[str, type]) -> list[dict[str, Any]]:
    """The objects of a file of JSON Lines (``.gz`` too), each with the keys of ``needs``.

    Raises DataError with the line that is none.
    """
    records = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            records.append(_record(line, needs, f"{path}:{number}"))
    if not records:
        raise DataError(f"{path}: has no records")
    return records


def distinct(records: Sequence[dict[str, Any]], key: str, path: Path) -> Sequence[dict[str, Any]]:
    """The same records; DataError where two have the same ``key``."""
    seen = set()
    for record in records:
        if record[key] in seen:
            raise DataError(f"{path}: two records have the {key} {record[key]!r}")
        seen.add(record[key])
    return records


def _record(line: str, needs: Mapping[str, type], place: str) -> dict[str, Any]:
    try:
        record = parse_json(line.encode())
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected an object, got {type(record).__name__}")
    for key, kind in needs.items():
        if not isinstance(record.get(key), kind):
            has = ", ".join(map(repr, record))
            raise DataError(f"{place}: expected the key {key!r}, a {kind.__name__}; it has {has}")
    return record


def _text(path: Path) -> str:
    with file_errors(path, DataError):
        data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: damaged, or no gzip file: {error}; fetch it anew") from error
    try:
        return decode(data)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def spaced(items: Sequence[T], count: int | None) -> list[T]:
    """At most ``count`` of the items (None: all), evenly spaced from the first on."""
    count = min(len(items) if count is None else count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def as_bytes(text: str) -> bytes:
    """The text in UTF-8; half a surrogate pair, which JSON can spell and UTF-8 cannot, as is."""
    return text.encode("utf-8", "surrogatepass")


def fitted(prompt: bytes, room: int) -> bytes:
    """The end of a prompt that fits into ``room`` bytes, from a whole UTF-8 character on."""
    if len(prompt) <= room:
        return prompt
    kept = prompt[len(prompt) - room :]
    start = next((i for i, byte in enumerate(kept[:4]) if byte & 0xC0 != 0x80), 0)  # noqa: PLR2004
    return kept[start:]
