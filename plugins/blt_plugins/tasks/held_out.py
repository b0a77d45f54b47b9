"""The task of held-out text: bits per byte, as ``blt evaluate SOURCE FILES`` has them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import attrs

from blt_core.component import BuildContext, Component, not_empty
from blt_core.errors import DataError
from blt_core.evaluation.data import spaced
from blt_core.evaluation.figures import ratio
from blt_core.evaluation.protocol import Asked, Part, Passage
from blt_core.files import expand_home
from blt_core.storage.texts import read_document, visible_files


@attrs.frozen(kw_only=True)
class HeldOutParams:
    """path: a text file, or a folder of them."""

    path: str = attrs.field(converter=expand_home, validator=not_empty())


class HeldOut:
    """Bits per byte of whole documents, with EOS and without."""

    asks: Literal["text", "likelihood"] = "likelihood"

    def __init__(self, params: HeldOutParams, context: BuildContext) -> None:
        self._path, path = params.path, Path(params.path)
        files = visible_files(path) if path.is_dir() else [path]
        self._texts = [text for file in files if (text := read_document(file))]
        if not self._texts:
            raise DataError(f"{path}: no held-out text: there is no file, or all files are empty")

    def run(self, model: Asked, limit: int | None) -> list[Part]:
        """Score all documents, or ``limit`` of them."""
        texts = spaced(self._texts, limit)
        found = model.score([Passage(b"", text) for text in texts])
        sizes = [len(text) for text in texts]
        figures = {
            "bits_per_byte": ratio([e.logprob + e.eos for e in found], sizes, -1 / math.log(2)),
            "bits_per_byte_without_eos": ratio(
                [each.logprob for each in found], sizes, -1 / math.log(2)
            ),
        }
        return [Part("", len(texts), figures, told={"data": self._path, "bytes": sum(sizes)})]


HELD_OUT = Component(
    kind="task",
    name="held-out",
    factory=HeldOut,
    params=HeldOutParams,
    summary="bits per byte of text files",
)
