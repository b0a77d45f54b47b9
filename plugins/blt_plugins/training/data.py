"""The data of a run: training windows, and fixed samples for scores and calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import attrs

from blt_core.errors import DataError
from blt_core.model import Model
from blt_core.protocols import Corpus, Documents
from blt_plugins.training.acceptance import PREFIX_BYTES, prefixes
from blt_plugins.training.patches import check_patching
from blt_plugins.training.phases import trainable_scorer
from blt_plugins.training.settings import TrainSettings
from blt_plugins.training.windows import (
    Batch,
    Texts,
    Windows,
    cut_windows,
    make_batch,
    pack,
    sample,
)


@attrs.frozen(eq=False)
class Data:
    """documents and windows to train on; batches to score (``valid``) and to calibrate on.

    prefixes: of held-out documents, to judge drafts after.

    summary: how much text there is on both sides, in words.
    ``digest``: names the text, so that a resumed run is sure to read the same.
    """

    documents: Documents
    windows: Windows
    valid: Sequence[Batch]
    calibration: Sequence[Batch]
    prefixes: Sequence[bytes]
    digest: str
    summary: str


def load_data(corpus: Corpus, settings: TrainSettings, model: Model) -> Data:
    """Index the corpus. Raises DataError where it is unfit."""
    context = settings.context_bytes or model.context_bytes
    documents = corpus.documents("train")
    if not len(documents):
        raise DataError("the corpus has no document to train on; lower corpus.valid_percent")
    valid = corpus.documents("valid") if settings.valid_bytes else Texts([])
    if settings.valid_bytes and not len(valid):
        raise DataError(
            "the corpus holds no document out; give corpus.valid_path, raise "
            "corpus.valid_percent, or set train.valid_bytes = 0"
        )

    def batches(texts: Documents, windows: Windows, size: int) -> list[Batch]:
        groups = pack(sample(windows, size, settings.seed), settings.batch_bytes)
        return [make_batch(texts, group, model.scheme).to(model.device) for group in groups]

    trains = trainable_scorer(model) is not None and settings.scorer.steps > 0
    for texts in (documents, valid):
        check_patching(texts, model, context, trains_scorer=trains)
    windows = cut_windows(documents, context)
    return Data(
        documents,
        windows,
        batches(valid, cut_windows(valid, context), settings.valid_bytes),
        batches(documents, windows, settings.scorer.calibration_bytes),
        _prefixes(valid, settings, context),
        hashlib.sha256(f"{documents.digest}|{valid.digest}".encode()).hexdigest(),
        f"corpus: {_amount(documents)} to train on, {_amount(valid)} held out",
    )


def _prefixes(valid: Documents, settings: TrainSettings, context: int) -> list[bytes]:
    """Held-out text after which drafts are judged; none if there is no document of two bytes."""
    longest = min(PREFIX_BYTES, max(context // 2, 1))
    if not settings.valid_drafts or not (valid.sizes > 1).any():
        return []
    return prefixes(valid, settings.valid_drafts, longest=longest, seed=settings.seed)


def _amount(documents: Documents) -> str:
    return f"{len(documents)} documents ({int(documents.sizes.sum())} bytes)"
