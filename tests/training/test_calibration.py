"""Calibration: what it says of a threshold is what the patcher does with it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_core.component import BuildContext
from blt_core.errors import DataError
from blt_core.types import IdScheme
from blt_plugins.patching.entropy import EntropyParams, EntropyPatcher
from blt_plugins.patching.scorer import TransformerScorer, TransformerScorerParams
from blt_plugins.training.data.windows import Texts, cut_windows, make_batch, pack
from blt_plugins.training.scores.calibration import (
    calibrate,
    find_threshold,
    measure,
    patch_lengths,
    summarise,
)

TEXTS = [bytes(range(60)), b"for x in range(10):\n    print(x)\n" * 4, b"!", b"ab"]


def make_patcher(limit: int | None, scale: float = 40.0) -> EntropyPatcher:
    torch.manual_seed(1)
    params = TransformerScorerParams(dim=16, layers=1, heads=2, hidden=32, window=16)
    scorer = TransformerScorer(params, BuildContext())
    with torch.no_grad():  # else every entropy is the same
        scorer.head.weight.mul_(scale)
    return EntropyPatcher(
        EntropyParams(threshold=0.0, max_patch_bytes=limit, byte_scorer=scorer), BuildContext()
    )


def batches_of(texts: list[bytes]):
    documents = Texts(texts)
    groups = pack(cut_windows(documents, 512), 600)
    return [make_batch(documents, group, IdScheme()) for group in groups]


def lengths_by_flags(patcher: EntropyPatcher, texts: list[bytes]) -> list[int]:
    """Patch lengths counted from the patcher's own flags, one text at a time."""
    lengths = []
    for text in texts:
        rows = batches_of([text])[0].rows
        flags = patcher.flags(rows, None)[0, : len(text)].tolist()
        starts = [i for i, opens in enumerate(flags) if opens]
        lengths += [b - a for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    return sorted(lengths)


@pytest.mark.parametrize("limit", [None, 1, 3, 8])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_counted_lengths_are_those_of_the_patchers_flags(limit, share):
    patcher = make_patcher(limit)
    entropies = measure(patcher, batches_of(TEXTS))
    patcher.threshold = float(torch.cat(entropies).quantile(share)) + 1e-9
    counted = patch_lengths(entropies, limit, patcher.threshold)
    assert sorted(counted.tolist()) == lengths_by_flags(patcher, TEXTS)
    assert len(set(counted.tolist())) > 1 or limit == 1


def test_entropies_become_float64_on_the_cpu(float64_on_the_cpu):
    with float64_on_the_cpu:
        assert measure(make_patcher(8), batches_of(TEXTS))[0].dtype == torch.float64


@pytest.mark.parametrize("target", [1.5, 2.0, 4.0, 6.0])
def test_the_calibrated_patcher_makes_patches_of_the_wanted_mean(target):
    patcher = make_patcher(8)
    found = calibrate(patcher, batches_of(TEXTS), target)
    patcher.threshold = found.threshold
    lengths = lengths_by_flags(patcher, TEXTS)
    assert found.mean_patch_bytes == pytest.approx(sum(lengths) / len(lengths))
    assert found.reached
    assert abs(found.mean_patch_bytes - target) < 0.1
    assert found.bytes == sum(map(len, TEXTS))
    assert found.bytes == sum(n * count for n, count in found.histogram.items())
    assert sum(found.histogram.values()) == found.patches == len(lengths)


@given(
    st.lists(st.lists(st.floats(0, 5, width=16), min_size=1, max_size=30), min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(1, 8)),
    st.floats(1, 8),
)
def test_no_other_threshold_comes_nearer_to_the_target(rows, limit, target):
    entropies = [torch.tensor(row, dtype=torch.float64) for row in rows]
    found = summarise(entropies, limit, find_threshold(entropies, limit, target), target)
    candidates = sorted({value for row in rows for value in row} | {-1.0})
    means = [summarise(entropies, limit, each, target).mean_patch_bytes for each in candidates]
    assert means == sorted(means)
    best = min(abs(mean - target) for mean in means[1:])
    assert abs(found.mean_patch_bytes - target) <= best + 1e-9


def test_a_target_out_of_reach_is_refused_or_reported():
    with pytest.raises(DataError, match=r"12 bytes cannot be reached: patches have 1 to 8 bytes"):
        calibrate(make_patcher(8), batches_of(TEXTS), 12)
    assert not calibrate(make_patcher(8), batches_of([b"ab", b"c"]), 6.0).reached


def test_text_without_a_byte_is_refused():
    with pytest.raises(DataError, match="no text to calibrate on"):
        calibrate(make_patcher(8), batches_of([b""]), 4)
