"""Abilities of documents that tell how some of them are best read.

any_order: whether texts far apart are read about as quickly as neighbours. ``texts``: those of
several documents, given by an array of their numbers, with what neighbours share done once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from blt_core.protocols import Documents


def in_any_order(documents: Documents) -> bool:
    """Whether they say that they are; else they are read in their own order."""
    return bool(getattr(documents, "any_order", False))


def texts_of(documents: Documents, numbers: npt.NDArray[np.int64]) -> Iterator[bytes]:
    """The texts of some documents, each read when it is asked for."""
    texts = getattr(documents, "texts", None)
    if texts is None:
        return (documents[number] for number in numbers.tolist())
    found: Iterator[bytes] = texts(numbers)
    return found
