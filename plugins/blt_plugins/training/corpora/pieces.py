"""How some of the documents of a corpus are best read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from blt_core.protocols import Documents, ScatteredDocuments


def in_any_order(documents: Documents) -> bool:
    """Whether they say that they are; else they are read in their own order."""
    return isinstance(documents, ScatteredDocuments) and documents.any_order


def texts_of(documents: Documents, numbers: npt.NDArray[np.int64]) -> Iterator[bytes]:
    """The texts of some documents, each read when it is asked for."""
    if isinstance(documents, ScatteredDocuments):
        return documents.texts(numbers)
    return (documents[number] for number in numbers.tolist())
