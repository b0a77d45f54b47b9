"""The data of a run: training windows, and fixed samples for scores and calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import attrs

from blt_core.errors import DataError
from blt_core.model import Model
from blt_core.protocols import Corpus, Documents
from blt_plugins.training.corpora.patching import check_patching
from blt_plugins.training.data.prefixes import PREFIX_BYTES, batched, prefixes
from blt_plugins.training.data.shares import Share, deal
from blt_plugins.training.data.windows import (
    Batch,
    Texts,
    Window,
    Windows,
    cut_windows,
    make_batch,
    pack,
    sample,
)
from blt_plugins.training.setup.scorer import trainable_scorer
from blt_plugins.training.setup.settings import ScorerSettings, TrainSettings

T = TypeVar("T")


@attrs.frozen(eq=False)
class Data:
    """documents and windows to train on; batches to score (``valid``) and to calibrate on.

    The batches are no larger than the passes of training: they fit into memory as these do.
    Those to score, and the prefixes, are this process's share; all calibrate on the same text.
    prefixes: of held-out documents, to judge drafts after, in groups of like length;
    longest_prefix: in bytes, of those of all processes.
    summary: how much text there is on both sides, in words, and which steps exceed their size.
    ``digest``: names the text, so that a resumed run is sure to read the same.
    """

    documents: Documents
    windows: Windows
    valid: Share[Batch]
    calibration: Sequence[Batch]
    prefixes: Share[list[bytes]]
    longest_prefix: int
    digest: str
    summary: str


def load_data(
    corpus: Corpus, settings: TrainSettings, model: Model, *, rank: int = 0, world_size: int = 1
) -> Data:
    """Index the corpus, for process ``rank`` of ``world_size``.

    Raises DataError where it is unfit.
    """
    context = settings.context_bytes or model.context_bytes
    documents, valid = read_index(corpus, settings)
    trains = trainable_scorer(model) is not None and settings.scorer.steps > 0
    for texts in (documents, valid):
        check_patching(texts, model, context, trains_scorer=trains, save_dtype=settings.save_dtype)

    def batch(texts: Documents, group: Sequence[Window]) -> Batch:
        return make_batch(texts, group, model.scheme).to(model.device)

    def share(groups: Sequence[Sequence[T]]) -> Share[T]:
        return Share(groups[rank], max(map(len, groups)))

    windows = cut_windows(documents, context)
    scored = sample(cut_windows(valid, context), settings.valid_bytes, settings.seed)
    dealt = deal(scored, [window.length for window in scored], world_size)
    starts = _prefixes(valid, settings, context)
    passes = _pass_bytes(settings, trains_scorer=trains)
    scorer_pass = _pass_size(settings.scorer, settings.accumulate)
    summary = [
        f"corpus: {_amount(documents)} to train on, {_amount(valid)} held out",
        *_larger_steps(settings, passes, min(context, int(documents.sizes.max()) + 1)),
    ]
    return Data(
        documents,
        windows,
        share([list(pack(own, min(passes.values()))) for own in dealt]).map(partial(batch, valid)),
        [
            batch(documents, group)
            for group in pack(
                sample(windows, settings.scorer.calibration_bytes, settings.seed), scorer_pass
            )
        ],
        share([batched(own) for own in deal(starts, list(map(len, starts)), world_size)]),
        max(map(len, starts), default=0),
        hashlib.sha256(f"{documents.digest}|{valid.digest}".encode()).hexdigest(),
        "\n".join(summary),
    )


def read_index(corpus: Corpus, settings: TrainSettings) -> tuple[Documents, Documents]:
    """The documents to train on, and those held out; none where nothing is scored.

    The corpus indexes its files for it. Raises DataError where one of the two is missing.
    """
    documents = corpus.documents("train")
    if not len(documents):
        raise DataError("the corpus has no document to train on; lower corpus.valid_percent")
    valid = corpus.documents("valid") if settings.valid_bytes else Texts([])
    if settings.valid_bytes and not len(valid):
        raise DataError(
            "the corpus holds no document out; give corpus.valid_path, raise "
            "corpus.valid_percent, or set train.valid_bytes = 0"
        )
    return documents, valid


def _pass_size(of: TrainSettings | ScorerSettings, accumulate: int) -> int:
    """Bytes of one of the passes of a step."""
    return max(of.batch_bytes // accumulate, 1)


def _pass_bytes(settings: TrainSettings, *, trains_scorer: bool) -> dict[str, int]:
    """The bytes of a pass of what a run trains, by the key that sets them."""
    trained: dict[str, TrainSettings | ScorerSettings] = {}
    if trains_scorer:
        trained["train.scorer.batch_bytes"] = settings.scorer
    if settings.steps or not trained:
        trained["train.batch_bytes"] = settings
    return {key: _pass_size(of, settings.accumulate) for key, of in trained.items()}


def _larger_steps(
    settings: TrainSettings, passes: Mapping[str, int], longest: int
) -> Iterator[str]:
    """Where a pass is smaller than the longest window, which it takes whole all the same."""
    whole = settings.accumulate * longest
    for key, size in passes.items():
        if size < longest:
            yield (
                f"{key}: a pass takes a whole window of {longest} bytes, more than its {size}, so "
                f"steps have up to {whole}\n"
                f"  fix: raise it to {whole}, or lower train.accumulate or train.context_bytes"
            )


def _prefixes(valid: Documents, settings: TrainSettings, context: int) -> list[bytes]:
    """Held-out text after which drafts are judged; none if there is no document of two bytes."""
    longest = min(PREFIX_BYTES, max(context // 2, 1))
    if not settings.valid_drafts or not (valid.sizes > 1).any():
        return []
    return prefixes(valid, settings.valid_drafts, longest=longest, seed=settings.seed)


def _amount(documents: Documents) -> str:
    return f"{len(documents)} documents ({int(documents.sizes.sum())} bytes)"
