"""A corpus: sums of numbers, each a document.

Change ``Sums``. Documents have a fixed order, are never empty, and are read when they are asked
for; ``digest`` names their contents and order.

Try it:    blt plugins test corpus acme/name
Contracts: docs/kinds/corpus.md
"""

from __future__ import annotations

import hashlib
from random import Random
from typing import Literal

import attrs
import numpy as np

from blt_core import BuildContext, Component, at_least, hookimpl

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class SumsParams:
    """documents: how many there are; a tenth of them is held out. seed: of the numbers."""

    documents: int = attrs.field(default=2000, validator=at_least(10))
    seed: int = 0


class SumDocuments:
    """Lines such as ``12 + 7 = 19``."""

    def __init__(self, numbers: list[tuple[int, int]], name: str) -> None:
        self._numbers, self._name = numbers, name
        self.sizes = np.array([len(text) for text in self._texts()], dtype=np.int64)
        self.digest = hashlib.sha256(b"\n".join(self._texts())).hexdigest()

    def _texts(self) -> list[bytes]:
        return [self[index] for index in range(len(self))]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> bytes:
        one, other = self._numbers[index]
        return f"{one} + {other} = {one + other}".encode()

    def source(self, index: int) -> str:
        """Where a document is from, for messages."""
        return f"{self._name} sum {index}"


class Sums:
    """Sums of two numbers below 100."""

    def __init__(self, params: SumsParams, context: BuildContext) -> None:
        self.params = params

    def documents(self, split: Literal["train", "valid"]) -> SumDocuments:
        """Those of a split; no number pair is in both."""
        pairs = [(one, other) for one in range(100) for other in range(100)]
        Random(self.params.seed).shuffle(pairs)
        chosen = pairs[: self.params.documents]
        held_out = len(chosen) // 10
        return SumDocuments(chosen[:held_out] if split == "valid" else chosen[held_out:], split)


@hookimpl
def blt_components() -> list[Component]:
    """The corpus."""
    return [Component("corpus", NAME, Sums, SumsParams, "sums of two numbers")]
