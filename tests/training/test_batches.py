"""Windows and batches: every target once, little padding, an order that the seed alone decides."""

from __future__ import annotations

import time
from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_core.protocols import UNSCORED
from blt_core.types import IdScheme
from blt_plugins.training.windows import Batches, cut_windows, make_batch, pack, sample

SCHEMES = st.sampled_from([IdScheme(), IdScheme(4, 0, 1, 2, 260)])
DOCUMENTS = st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=8)


@given(DOCUMENTS, st.integers(1, 17), SCHEMES)
def test_every_target_is_predicted_once_and_rows_are_the_targets_before(documents, context, scheme):
    seen: list[list[int]] = [[] for _ in documents]
    for window in cut_windows(documents, context):
        batch = make_batch(documents, [window], scheme)
        ids, targets = batch.rows.ids_br[0].tolist(), batch.targets_br[0].tolist()
        assert len(ids) == len(targets) <= context
        assert ids == [scheme.bos, *targets[:-1]]
        seen[window.document] += targets
    assert seen == [[*scheme.encode(text), scheme.eos] for text in documents]


@given(DOCUMENTS, st.integers(1, 17), st.integers(1, 60), SCHEMES)
def test_packed_windows_are_scored_as_if_alone(documents, context, size, scheme):
    windows = cut_windows(documents, context)
    groups = list(pack(windows, size))
    assert Counter(w for group in groups for w in group) == Counter(windows)
    for group in groups:
        batch = make_batch(documents, group, scheme)
        assert len(group) == 1 or batch.rows.ids_br.numel() <= size
        assert batch.scored == int((batch.targets_br != UNSCORED).sum())
        ends = int((batch.targets_br == scheme.eos).sum())
        assert sum(batch.sizes) == batch.scored - ends
        for row, window in enumerate(group):
            alone = make_batch(documents, [window], scheme)
            count = window.length
            assert torch.equal(batch.rows.ids_br[row, :count], alone.rows.ids_br[0])
            assert torch.equal(batch.targets_br[row, :count], alone.targets_br[0])


@given(DOCUMENTS, st.integers(0, 3))
def test_batches_depend_on_the_seed_and_their_number_alone(documents, seed):
    def make() -> Batches:
        windows = cut_windows(documents, 8)
        return Batches(documents, windows, scheme=IdScheme(), batch_bytes=16, seed=str(seed))

    forwards = [make()[number].rows.ids_br for number in range(12)]
    one = make()
    for number in (11, 3, 7, 0, 11):
        assert torch.equal(one[number].rows.ids_br, forwards[number])


@given(DOCUMENTS)
def test_each_epoch_reads_every_window_once(documents):
    windows = cut_windows(documents, 8)
    batches = Batches(documents, windows, scheme=IdScheme(), batch_bytes=16, seed="s")
    targets, number = sum(w.length for w in windows), 0
    for _ in range(3):
        read = 0
        while read < targets:
            read += batches[number].scored
            number += 1
        assert read == targets


@given(DOCUMENTS, st.integers(1, 200))
def test_a_sample_is_whole_windows_of_about_the_wanted_size(documents, size):
    windows = cut_windows(documents, 8)
    chosen = sample(windows, size, 0)
    assert len(set(chosen)) == len(chosen)
    total = sum(w.length for w in chosen)
    assert total >= min(size, sum(w.length for w in windows))
    assert total < size + 8


def test_a_sample_of_many_windows_takes_no_time():
    windows = cut_windows([bytes(200_000)], 1)
    began = time.perf_counter()
    assert len(sample(windows, 150_000, 0)) == 150_000
    assert time.perf_counter() - began < 10  # minutes if the sum were taken anew for each
