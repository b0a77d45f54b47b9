"""What corpora promise."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from blt_core.protocols import Documents
from blt_core.testing.contracts import Broken, Contracts, NotPromised, require, reseed
from blt_core.testing.subject import Subject

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
    "Made again it has the same documents in the same order, in any global random state, and the "
    "same digest.",
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


@CORPUS.add(
    "digest",
    "`digest` is a text that names the contents: splits with other documents have other digests.",
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
