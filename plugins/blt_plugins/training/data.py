"""The data of a run: training windows, and fixed samples for scores and calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import attrs

from blt_core.errors import DataError
from blt_core.model import Model
from blt_core.protocols import Corpus
from blt_plugins.training.acceptance import PREFIX_BYTES, prefixes
from blt_plugins.training.settings import TrainSettings
from blt_plugins.training.windows import Batch, Window, cut_windows, make_batch, pack, sample


@attrs.frozen(eq=False)
class Data:
    """documents and windows to train on; batches to score (``valid``) and to calibrate on.

    prefixes: of held-out documents, to judge drafts after.

    summary: how much text there is on both sides, in words.
    ``digest``: names the text, so that a resumed run is sure to read the same.
    """

    documents: Sequence[bytes]
    windows: Sequence[Window]
    valid: Sequence[Batch]
    calibration: Sequence[Batch]
    prefixes: Sequence[bytes]
    digest: str
    summary: str


def load_data(corpus: Corpus, settings: TrainSettings, model: Model) -> Data:
    """Read the whole corpus into memory. Raises DataError where it is unfit."""
    context = settings.context_bytes or model.context_bytes
    documents = list(corpus.documents("train"))
    if not documents:
        raise DataError("the corpus has no document to train on; lower corpus.valid_percent")
    valid = list(corpus.documents("valid")) if settings.valid_bytes else []
    if settings.valid_bytes and not valid:
        raise DataError(
            "the corpus holds no document out; give corpus.valid_path, raise "
            "corpus.valid_percent, or set train.valid_bytes = 0"
        )

    def batches(texts: Sequence[bytes], windows: Sequence[Window], size: int) -> list[Batch]:
        groups = pack(sample(windows, size, settings.seed), settings.batch_bytes)
        return [make_batch(texts, group, model.scheme).to(model.device) for group in groups]

    windows = cut_windows(documents, context)
    return Data(
        documents,
        windows,
        batches(valid, cut_windows(valid, context), settings.valid_bytes),
        batches(documents, windows, settings.scorer.calibration_bytes),
        _prefixes(valid, settings, context),
        digest(documents, valid),
        f"corpus: {_amount(documents)} to train on, {_amount(valid)} held out",
    )


def _prefixes(valid: Sequence[bytes], settings: TrainSettings, context: int) -> list[bytes]:
    """Held-out text after which drafts are judged; none if there is no document of two bytes."""
    longest = min(PREFIX_BYTES, max(context // 2, 1))
    if not settings.valid_drafts or all(len(text) < 2 for text in valid):  # noqa: PLR2004
        return []
    return prefixes(valid, settings.valid_drafts, longest=longest, seed=settings.seed)


def digest(*splits: Sequence[bytes]) -> str:
    """A name for some documents and their order."""
    total = hashlib.sha256()
    for documents in splits:
        for text in documents:
            total.update(hashlib.sha256(text).digest())
        total.update(b"|")
    return total.hexdigest()


def _amount(documents: Sequence[bytes]) -> str:
    return f"{len(documents)} documents ({sum(map(len, documents))} bytes)"
