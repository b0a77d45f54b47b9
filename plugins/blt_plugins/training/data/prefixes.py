"""Beginnings of held-out documents, to generate from."""

from __future__ import annotations

import random
from collections.abc import Sequence

from blt_core.errors import DataError
from blt_core.protocols import Documents

#: Longest prefix: more of it changes drafts little, and reading it is what takes time.
PREFIX_BYTES = 512


def prefixes(documents: Documents, count: int, *, longest: int, seed: int = 0) -> list[bytes]:
    """``count`` runs of at most ``longest`` bytes that end at random places of the documents.

    Raises DataError if there is no document of two bytes.
    """
    rng = random.Random(f"{seed}/prefixes")
    sizes = (documents.sizes - 1).clip(min=0).tolist()
    if not any(sizes):
        raise DataError("no held-out text to draft after: the documents are empty")
    found = []
    for index in rng.choices(range(len(sizes)), sizes, k=count):
        text = documents[index]
        end = rng.randrange(1, len(text))
        found.append(text[max(end - longest, 0) : end])
    return found


def batched(prompts: Sequence[bytes], size: int = 16) -> list[list[bytes]]:
    """Groups of like length, since a batch computes as many rows for all."""
    ordered = sorted(prompts, key=len)
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]
