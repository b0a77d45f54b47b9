"""Shards of documents and their patches: Arrow IPC files, and the manifest that lists them.

The schema is documented in docs/data.md. A shard has one row a document: ``text`` (large_binary),
``opens`` (list<bool>, one for each byte and one for EOS), ``source`` (string).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from blt_core.errors import DataError, RunError
from blt_core.files import parse_json, read_json
from blt_core.storage.folders import file_errors
from blt_plugins.training.corpora.arrow import arrow, arrow_errors
from blt_plugins.training.corpora.patching import show

#: The version of this format.
VERSION = 1
MANIFEST = "manifest.json"
#: Key of the metadata in the schema of each shard.
METADATA = b"blt"

Opens = npt.NDArray[np.bool_]
#: (text, opens, source) of a document.
Row = tuple[bytes, Opens, str]


@attrs.frozen
class Shard:
    """One finished file. patches: those of its bytes, BOS not counted. sha256: of the file."""

    documents: int
    bytes: int
    patches: int
    file_bytes: int
    sha256: str


@attrs.frozen(kw_only=True)
class Manifest:
    """What a folder of shards holds.

    patching: what the patches depend on. digests: of the documents of each split. documents: how
    many there are. weights: of the documents to train on, as a mixture gives them. shards: the
    finished ones, by their path in the folder. complete: whether these are all.
    """

    patching: Mapping[str, Any]
    digests: Mapping[str, str]
    documents: Mapping[str, int]
    weights: Sequence[Sequence[float]]
    shard_bytes: int
    shards: Mapping[str, Shard] = attrs.field(factory=dict)
    complete: bool = False

    @property
    def head(self) -> dict[str, Any]:
        """All but what is done so far: what must not change between the parts of a run."""
        own = attrs.asdict(self)
        return {key: own[key] for key in own if key not in {"shards", "complete"}}

    def of(self, split: str) -> dict[str, Shard]:
        """The shards of one split, in order."""
        return {p: s for p, s in sorted(self.shards.items()) if p.startswith(f"{split}/")}


def shard_path(split: str, number: int) -> str:
    """The path of a shard in its folder."""
    return f"{split}/{number:06}.arrow"


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None if it has none. Raises DataError for one that is damaged."""
    path = folder / MANIFEST
    try:
        with file_errors(path, DataError):
            if not path.exists():
                return None
            record = read_json(path)
        version = record.pop("version")
        if version == VERSION:
            shards = {name: Shard(**shard) for name, shard in record.pop("shards").items()}
            return Manifest(**record, shards=shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no manifest of prepared documents: {error}") from error
    raise DataError(f"{path}: has version {version}; this program reads version {VERSION}")


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest in the place of an older one."""
    text = json.dumps({"version": VERSION, **attrs.asdict(manifest)}, indent=1, sort_keys=True)
    with replaced(folder / MANIFEST) as fresh:
        fresh.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary name for a file that takes the name ``path`` when it is complete on the disk.

    Raises RunError if it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.new")
    with file_errors(path, RunError):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        fresh.replace(path)


def write_shard(path: Path, groups: Iterable[Sequence[Row]], metadata: Mapping[str, Any]) -> Shard:
    """Write one shard, a record batch for each group of documents."""
    pa, sums = arrow(), np.zeros(3, dtype=np.int64)
    text = json.dumps(dict(metadata), sort_keys=True)
    schema = _schema().with_metadata({METADATA: text})
    with replaced(path) as fresh:
        with pa.ipc.new_file(str(fresh), schema) as writer:
            for group in groups:
                writer.write_batch(_record_batch(group, schema))
                for data, opens, _ in group:
                    sums += (1, len(data), int(opens[:-1].sum()))
        size, sha256 = fresh.stat().st_size, file_digest(fresh)
    documents, length, patches = sums.tolist()
    return Shard(documents, length, patches, size, sha256)


def shard_metadata(
    patching: Mapping[str, Any], corpus: str, split: str, first: int
) -> dict[str, Any]:
    """What a shard says of itself, in plain values, for JSON.

    corpus: the digest of its split. first: the number of its first document there.
    """
    return {
        "version": VERSION,
        "patching": dict(patching),
        "corpus": corpus,
        "split": split,
        "first": first,
    }


def check_shard(path: Path, file: Any, expected: Mapping[str, Any]) -> None:
    """Raise DataError unless an open shard says of itself what ``shard_metadata`` expects.

    The length alone does not tell: patches of another threshold take as many bytes.
    """
    text = (file.schema.metadata or {}).get(METADATA)
    try:
        found = _flat(parse_json(text or b"null"))
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no shard of prepared documents: its metadata is none") from error
    wanted = _flat(expected)
    wrong = [key for key in wanted if found.get(key) != wanted[key]]
    if wrong:
        lines = "".join(
            f"\n  {k}: {show(found.get(k))} there, {show(wanted[k])} in {MANIFEST}" for k in wrong
        )
        raise DataError(
            f"{path}: a shard of other prepared documents than the rest of its folder:{lines}\n"
            "  fix: run blt prepare again, which makes it anew"
        )


def _flat(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with the keys of ``patching`` beside the others."""
    others = {key: value for key, value in metadata.items() if key != "patching"}
    return {**others, **metadata.get("patching", {})}


def _schema() -> Any:
    pa = arrow()
    return pa.schema(
        [("text", pa.large_binary()), ("opens", pa.list_(pa.bool_())), ("source", pa.string())]
    )


def _record_batch(group: Sequence[Row], schema: Any) -> Any:
    pa = arrow()
    ends = np.cumsum([0, *(len(opens) for _, opens, _ in group)], dtype=np.int32)
    flags = pa.array(np.concatenate([opens for _, opens, _ in group]))
    columns = [
        pa.array([text for text, _, _ in group], pa.large_binary()),
        pa.ListArray.from_arrays(pa.array(ends), flags),
        pa.array([source for _, _, source in group], pa.string()),
    ]
    return pa.record_batch(columns, schema=schema)


def open_shard(path: Path) -> Any:
    """The file, memory-mapped. Raises DataError if it is none, or no shard."""
    pa = arrow()
    with arrow_errors(path):
        file = pa.ipc.open_file(pa.memory_map(str(path)))
    if file.schema.remove_metadata() != _schema():
        raise DataError(f"{path}: no shard of prepared documents: it has other columns")
    return file


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            total.update(part)
    return total.hexdigest()
