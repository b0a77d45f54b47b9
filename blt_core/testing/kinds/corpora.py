"""What corpora promise."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import numpy as np

from blt_core.errors import BltError
from blt_core.protocols import Documents, ScatteredDocuments
from blt_core.testing.contracts import Broken, Contracts, NotPromised, require, reseed
from blt_core.testing.elsewhere import require_same
from blt_core.testing.subject import Subject
from blt_core.wiring.resolve import resolve_component

CORPUS = Contracts("corpus")

SPLITS: tuple[Literal["train", "valid"], ...] = ("train", "valid")
#: Documents that are read at most, of a large corpus.
READ = 200


def _documents(subject: Subject, split: Literal["train", "valid"]) -> Documents:
    found: Documents = subject.build().documents(split)
    return found


@CORPUS.add(
    "documents",
    "Documents are bytes, none empty; `sizes` (int64) says how many bytes each has.",
)
def _sizes(subject: Subject, _: None) -> None:
    some = 0
    for split in SPLITS:
        found = _documents(subject, split)
        sizes: Any = found.sizes
        if not isinstance(sizes, np.ndarray) or sizes.dtype != np.int64 or sizes.ndim != 1:
            shown = getattr(sizes, "dtype", type(sizes).__name__)
            raise Broken(f"{split}: sizes are {shown}; expected an int64 array (documents,)")
        require(len(sizes) == len(found), f"{split}: {len(sizes)} sizes of {len(found)} documents")
        require(bool((sizes > 0).all()), f"{split}: document {int(sizes.argmin())} is empty")
        some += len(found)
        for index in range(min(len(found), READ)):
            text: Any = found[index]
            if not isinstance(text, bytes):
                raise Broken(f"{split}: document {index} is {type(text).__name__}; expected bytes")
            if len(text) != sizes[index]:
                raise Broken(
                    f"{split}: document {index} has {len(text)} bytes, and {sizes[index]} by sizes"
                )
    require(some, "it has no documents")


@CORPUS.add("source", "`source(index)` names where a document is from.")
def _source(subject: Subject, _: None) -> None:
    found = _documents(subject, "train")
    for index in range(min(len(found), READ)):
        name = found.source(index)
        require(isinstance(name, str) and name, f"source({index}) gave {name!r}")


@CORPUS.add(
    "deterministic",
    "Made again it has the same documents in the same order, in any global random state and in any "
    "process, and the same digest.",
)
def _deterministic(subject: Subject, _: None) -> None:
    for split in SPLITS:
        kept = []
        for number in range(2):
            reseed(number)
            found = _documents(subject, split)
            order = range(min(len(found), READ))
            texts = {index: found[index] for index in (order if number else reversed(order))}
            kept.append((found.digest, found.sizes.tolist(), texts))
        require(kept[0] == kept[1], f"{split}: other documents when it is made again")
    require_same(subject, f"{__name__}:told")


def told(subject: Subject) -> dict[str, str]:
    """The digest of each split, and the first of its documents, as texts."""
    found = {}
    for split in SPLITS:
        documents = _documents(subject, split)
        texts = [documents[index] for index in range(min(len(documents), READ))]
        found[f"{split}: the digest"] = documents.digest
        found[f"{split}: the order of documents"] = repr((documents.sizes.tolist(), texts))
    return found


@CORPUS.add(
    "digest",
    "`digest` is a text that names the contents: splits with other documents have other digests, "
    "and so has a file in which a byte is another, of the same size and time.",
    idle="no file that its keys name could be changed",
)
def _digest(subject: Subject, _: None) -> None:
    found = [_documents(subject, split) for split in SPLITS]
    for split, each in zip(SPLITS, found, strict=True):
        digest = each.digest
        require(isinstance(digest, str) and digest, f"{split}: its digest is {digest!r}")
    texts = [[each[i] for i in range(min(len(each), READ))] for each in found]
    if texts[0] != texts[1]:
        require(
            found[0].digest != found[1].digest,
            "train and valid have other documents and the same digest",
        )
    _changed(subject)


#: Bytes of the files that are copied to be changed, and how many files, at most.
MOST_BYTES = 1 << 22
MOST_FILES = 200


def _changed(subject: Subject) -> None:
    """Broken unless a letter that is changed in a copy of the corpus's files changes its digest."""
    with tempfile.TemporaryDirectory(prefix="blt-") as name:
        node = resolve_component(subject.kind, subject.own_table, subject.plugins)
        table = _copied(node.describe(), Path(name))
        copy = attrs.evolve(subject, table={k: v for k, v in table.items() if k != "use"})
        try:
            before = {split: _told(copy, split) for split in SPLITS}
        except BltError:  # it cannot be read elsewhere
            return
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        for text in [text for _, texts in before.values() for text in texts[:2]]:
            if not _change(files, text):
                continue
            try:
                after = {split: _told(copy, split) for split in SPLITS}
            except BltError:  # it knows what its files held
                return
            for split in SPLITS:
                if before[split][1] != after[split][1]:
                    subject.exercised()
                    require(
                        before[split][0] != after[split][0],
                        f"{split}: a byte of its files was changed, and its digest is the same",
                    )
            return


def _told(subject: Subject, split: Literal["train", "valid"]) -> tuple[str, list[bytes]]:
    found = _documents(subject, split)
    return found.digest, [found[index] for index in range(min(len(found), READ))]


def _copied(value: Any, folder: Path) -> Any:
    """A table whose small files and folders are copies in ``folder``."""
    if isinstance(value, Mapping):
        return {key: _copied(each, folder) for key, each in value.items()}
    if not isinstance(value, str) or not value or not Path(value).exists():
        return value
    source, target = Path(value), folder / f"{sum(1 for _ in folder.iterdir())}" / Path(value).name
    files = [source] if source.is_file() else itertools.islice(source.rglob("*"), MOST_FILES + 1)
    sizes = [path.stat().st_size for path in files if path.is_file()]
    if len(sizes) > MOST_FILES or sum(sizes) > MOST_BYTES:
        return value
    target.parent.mkdir()
    if source.is_file():
        shutil.copy2(source, target)
    else:
        shutil.copytree(source, target)
    return str(target)


def _change(files: list[Path], text: bytes) -> bool:
    """Make a letter of a document another one in the file that holds it, of the same time."""
    at = next((i for i in range(len(text) // 2, len(text)) if text[i : i + 1].isalpha()), None)
    if at is None:
        return False
    for path in files:
        held, times = path.read_bytes(), path.stat()
        if text in held:
            other = text[:at] + (b"q" if text[at : at + 1] != b"q" else b"z") + text[at + 1 :]
            path.write_bytes(held.replace(text, other, 1))
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            return True
    return False


@CORPUS.add(
    "weights",
    "With `weights`, the runs that it weighs cover the documents, each with a weight above 0.",
)
def _weights(subject: Subject, _: None) -> None:
    found = _documents(subject, "train")
    weights: Any = getattr(found, "weights", None)
    if weights is None:
        raise NotPromised("it has no weights")
    require(
        sum(count for count, _ in weights) == len(found),
        f"weights are of {sum(count for count, _ in weights)} of {len(found)} documents",
    )
    require(all(weight > 0 for _, weight in weights), f"weights {weights!r} are not all above 0")


@CORPUS.add(
    "opens",
    "With `patching`, `opens` gives a bool for each byte and EOS of a document.",
)
def _opens(subject: Subject, _: None) -> None:
    found: Any = _documents(subject, "train")
    if getattr(found, "patching", None) is None:
        raise NotPromised("it does not tell patches")
    for index in range(min(len(found), READ)):
        opens = found.opens(index)
        want = int(found.sizes[index]) + 1
        if getattr(opens, "dtype", None) != np.bool_ or opens.shape != (want,):
            raise Broken(
                f"opens({index}) is {getattr(opens, 'shape', opens)!r}; expected ({want},)"
            )


@CORPUS.add(
    "texts",
    "With `texts`, several documents are what each is alone, in the order of the numbers that are "
    "given, one of them again too; `any_order` is a bool.",
)
def _texts(subject: Subject, _: None) -> None:
    found: Any = _documents(subject, "train")
    if not isinstance(found, ScatteredDocuments):
        raise NotPromised("it reads documents one by one")
    require(type(found.any_order) is bool, f"any_order is {found.any_order!r}")
    forwards = list(range(min(len(found), READ)))
    for numbers in (forwards, forwards[::-1], [*forwards[::2], 0, 0]):
        texts = list(found.texts(np.array(numbers)))
        require(len(texts) == len(numbers), f"{len(numbers)} documents have {len(texts)} texts")
        for number, text in zip(numbers, texts, strict=True):
            require(text == found[number], f"texts({numbers}) gave another document {number}")
