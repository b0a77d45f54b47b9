"""Windows and batches: every target once, little padding, an order that the seed alone decides."""

from __future__ import annotations

import random
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_core.errors import DataError
from blt_core.protocols import UNSCORED
from blt_core.types import IdScheme
from blt_plugins.training.data import order
from blt_plugins.training.data.load import load_data
from blt_plugins.training.data.order import RUN, SPREAD, Batches, phases, run_length
from blt_plugins.training.data.windows import Texts, Windows, cut_windows, make_batch, pack, sample

SCHEMES = st.sampled_from([IdScheme(), IdScheme(4, 0, 1, 2, 260)])
DOCUMENTS = st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=8).map(Texts)


def make(documents, seed="s", context=8, batch_bytes=16, **keys) -> Batches:
    windows = cut_windows(documents, context)
    keys = {"scheme": IdScheme(), "batch_bytes": batch_bytes, "seed": seed, **keys}
    return Batches(documents, windows, **keys)


def one_pass(batches: Batches, targets: int, number: int = 0) -> list:
    """The batches from ``number`` on that hold as many targets as a pass."""
    found, read = [], 0
    while read < targets:
        found.append(batches[number + len(found)])
        read += found[-1].scored
    assert read == targets, "a pass ends where a batch ends"
    return found


def rows(batches) -> Counter:
    """The targets of all rows, and how often each occurs."""
    return Counter(
        tuple(targets[:length])
        for batch in batches
        for targets, length in zip(batch.targets_br.tolist(), batch.rows.lengths, strict=True)
    )


# -- windows -------------------------------------------------------------------------------------


@given(DOCUMENTS, st.integers(1, 17), SCHEMES)
def test_every_target_is_predicted_once_and_rows_are_the_targets_before(documents, context, scheme):
    seen: list[list[int]] = [[] for _ in range(len(documents))]
    for window in cut_windows(documents, context):
        batch = make_batch(documents, [window], scheme)
        ids, targets = batch.rows.ids_br[0].tolist(), batch.targets_br[0].tolist()
        assert len(ids) == len(targets) <= context
        assert ids == [scheme.bos, *targets[:-1]]
        seen[window.document] += targets
    assert seen == [[*scheme.encode(text), scheme.eos] for text in documents]


@given(DOCUMENTS, st.integers(1, 17))
def test_windows_are_found_by_their_number_and_by_their_place(documents, context):
    windows = cut_windows(documents, context)
    listed = list(windows)
    assert [windows[i] for i in range(len(windows))] == listed == windows[:]
    ends = np.cumsum([0, *(w.length for w in listed)])
    numbers = np.arange(len(windows) + 1)
    assert windows.targets_before(numbers).tolist() == ends.tolist()
    assert windows.targets == ends[-1]
    for target in range(windows.targets + 1):
        (number,) = windows.from_target(np.array([target]))
        assert ends[number] >= target
        assert number == 0 or ends[number - 1] < target


def test_a_window_out_of_range_is_no_window():
    windows = Windows(np.array([9]), 4)
    assert windows[-1] == windows[2]
    for index in (3, -4):
        with pytest.raises(IndexError):
            windows[index]


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


@given(
    st.lists(st.text("ab", max_size=9).map(str.encode), min_size=1, max_size=4),
    st.text("ab", min_size=1, max_size=3).map(str.encode),
    st.integers(1, 12),
    SCHEMES,
)
def test_what_follows_a_marker_is_scored_alone(texts, marker, context, scheme):
    windows = list(cut_windows(Texts(texts), context))
    whole = make_batch(Texts(texts), windows, scheme)
    batch = whole.after(scheme.encode(marker))
    assert torch.equal(batch.rows.ids_br, whole.rows.ids_br)
    for row, length in enumerate(whole.rows.lengths):
        targets = whole.targets_br[row, :length].tolist()
        # b"\xff" stands for EOS, which no marker holds.
        text = bytes(0xFF if each == scheme.eos else each - scheme.byte_offset for each in targets)
        end = text.find(marker) + len(marker)
        first = end if marker in text and end < length else 0
        found = batch.targets_br[row, :length].tolist()
        assert found == [UNSCORED] * first + targets[first:]
        assert (batch.targets_br[row, length:] == UNSCORED).all()


# -- order ---------------------------------------------------------------------------------------

SHUFFLES = st.sampled_from([1, 20, 100, 10**6])


@given(DOCUMENTS, st.integers(0, 3), SHUFFLES)
def test_batches_depend_on_the_seed_and_their_number_alone(documents, seed, shuffle):
    def new() -> Batches:
        return make(documents, str(seed), shuffle_bytes=shuffle)

    forwards = [new()[number].rows.ids_br for number in range(12)]
    one = new()
    for number in (11, 3, 7, 0, 11):
        assert torch.equal(one[number].rows.ids_br, forwards[number])


@given(DOCUMENTS, SHUFFLES, st.integers(1, 17))
def test_each_pass_reads_every_window_once_however_much_is_shuffled(documents, shuffle, context):
    batches = make(documents, context=context, shuffle_bytes=shuffle)
    windows, number = cut_windows(documents, context), 0
    expected = rows(make_batch(documents, [window], IdScheme()) for window in windows)
    for _ in range(3):
        found = one_pass(batches, windows.targets, number)
        assert rows(found) == expected
        number += len(found)


@given(DOCUMENTS, SHUFFLES)
def test_the_size_of_a_batch_is_known_without_its_text(documents, shuffle):
    sizes = [make(documents, shuffle_bytes=shuffle)[number].scored for number in range(9)]

    class Unread(Texts):
        def __getitem__(self, index):
            raise AssertionError("text was read")

    unread = make(Unread([documents[i] for i in range(len(documents))]), shuffle_bytes=shuffle)
    assert [unread.size(number) for number in range(9)] == sizes


def test_passes_and_seeds_differ_in_their_order():
    documents = Texts([bytes([i]) * 7 for i in range(100)])
    one, other = make(documents), make(documents, "t")
    first, second = (
        [batch.rows.ids_br.tolist() for batch in one_pass(one, 800, number)] for number in (0, 50)
    )
    assert first != second
    assert first != [batch.rows.ids_br.tolist() for batch in one_pass(other, 800)]


def documents_read(batches: Batches, count: int) -> list[list[int]]:
    return [sorted({row[1] for row in batches[n].rows.ids_br.tolist()}) for n in range(count)]


def test_a_corpus_smaller_than_what_is_shuffled_is_shuffled_whole():
    documents = Texts([bytes([i]) * 7 for i in range(200)])
    read = [doc for docs in documents_read(make(documents), 100) for doc in docs]
    steps = [abs(a - b) for a, b in pairwise(read)]
    assert sum(steps) / len(steps) > 200 / 4, "a third of the corpus, if the order is random"


def test_reading_has_locality_where_the_corpus_is_larger_than_what_is_shuffled():
    documents = Texts([bytes([i]) * 7 for i in range(240)])
    opened = []

    class Watched(Texts):
        def __getitem__(self, index):
            opened.append(index)
            return documents[index]

    watched = Watched([documents[i] for i in range(240)])
    # Chunks of 10 windows, pools of 640: 80 · 8 targets.
    batches = make(watched, shuffle_bytes=640 * 8)
    one_pass(batches, 240 * 8)
    assert opened == list(range(240)), "one pool: each document once, in order"
    opened.clear()
    batches = make(watched, shuffle_bytes=80 * 8)
    one_pass(batches, 240 * 8)
    assert sorted(opened) == list(range(240)), "each document is read once in a pass"
    assert opened != sorted(opened)
    assert sum(b > a for a, b in pairwise(opened)) >= 240 - 4, "and in order within each pool"


class AnyOrder(Texts):
    """Documents that may be read in any order; ``read``: which were, in order."""

    any_order = True

    def __init__(self, texts) -> None:
        super().__init__(texts)
        self.read: list[int] = []

    def texts(self, numbers):
        for number in numbers.tolist():
            self.read.append(number)
            yield self[number]


@given(DOCUMENTS, SHUFFLES, st.integers(1, 17), st.integers(1, 50))
def test_batches_are_the_same_however_much_is_read_at_a_time(documents, shuffle, context, piece):
    pieces = AnyOrder([documents[i] for i in range(len(documents))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "PIECE_BYTES", piece)
        one, other = (
            make(each, context=context, shuffle_bytes=shuffle) for each in (documents, pieces)
        )
        for number in range(20):
            assert torch.equal(one[number].targets_br, other[number].targets_br)
            assert torch.equal(one[number].rows.ids_br, other[number].rows.ids_br)


def test_a_batch_reads_no_more_than_lies_near_it_and_nothing_twice(monkeypatch):
    monkeypatch.setattr(order, "PIECE_BYTES", 8 * 4)
    documents = AnyOrder([bytes([i]) * 7 for i in range(240)])
    batches = make(documents)
    for number in range(120):
        before = len(documents.read)
        wanted = {row[1] for row in batches[number].rows.ids_br.tolist()}
        read = documents.read[before:]
        assert len(read) <= 2 * 4
        assert {each // 4 for each in read} <= {each // 4 for each in wanted}
        assert read == sorted(read)
    assert sorted(documents.read) == list(range(240))


def test_a_document_that_has_become_shorter_is_named():
    documents = Texts([b"some text", b"more text"])
    batches = make(documents)
    documents._texts[1] = b"m"
    with pytest.raises(DataError, match=r"changed while it was in use\n  fix: "):
        one_pass(batches, 20)


@pytest.mark.parametrize("spread", [0, 60])
def test_batches_of_short_documents_are_full(spread):
    rng = random.Random(0)
    sizes = [100 + rng.randint(-spread, spread) for _ in range(20_000)]
    documents = Texts([bytes(size) for size in sizes])
    batches = make(documents, context=1024, batch_bytes=65_536)
    read = [batches.size(0)]
    while sum(read) < sum(sizes) + len(sizes):
        read.append(batches.size(len(read)))
    assert sum(read) / len(read) >= 0.8 * 65_536


def test_windows_are_sorted_in_runs_that_grow_with_a_batch():
    assert run_length(np.full(9, 1024), 4096) == RUN
    assert run_length(np.full(9, 100), 65_536) == 8 * 65_536 // 100
    assert run_length(np.zeros(0, dtype=np.int64), 65_536) == RUN


@given(st.integers(1, 3000), st.integers(0, 5), st.sampled_from([0.1, 0.5, 0.75, 2.5]))
def test_a_part_of_a_pass_is_read_evenly_and_all_of_it_in_the_end(count, epoch, weight):
    shift = phases(np.arange(count), count, "s")
    assert ((shift >= 0) & (shift < 1)).all()
    times = np.floor((epoch + 1) * weight + shift) - np.floor(epoch * weight + shift)
    assert abs(times.sum() - weight * count) <= 1 + count // SPREAD
    whole = np.floor(20 * weight + shift) - np.floor(shift)
    assert (whole == round(20 * weight)).all()


# -- samples -------------------------------------------------------------------------------------


@given(DOCUMENTS, st.integers(1, 200))
def test_a_sample_is_whole_windows_of_about_the_wanted_size(documents, size):
    windows = cut_windows(documents, 8)
    chosen = sample(windows, size, 0)
    assert len(set(chosen)) == len(chosen)
    total = sum(w.length for w in chosen)
    assert total >= min(size, windows.targets)
    assert total < size + 8
    assert set(chosen) <= set(windows)


def test_a_sample_of_nothing_is_nothing():
    assert sample(cut_windows(Texts([]), 8), 100, 0) == []


def test_a_sample_of_many_windows_takes_no_time():
    windows = cut_windows(Texts([bytes(200_000)]), 1)
    began = time.process_time()
    assert len(sample(windows, 150_000, 0)) == 150_000
    assert time.process_time() - began < 10  # minutes if the sum were taken anew for each


def test_a_sample_of_unequal_windows_is_found_in_the_end():
    sizes = [1] * 1000 + [1_000_000]
    random.Random(0).shuffle(sizes)
    windows = Windows(np.array(sizes), 2**20)
    assert sum(w.length for w in sample(windows, 10**6, 0)) >= 10**6


# -- of a run ------------------------------------------------------------------------------------


def test_what_is_scored_and_calibrated_on_fits_into_the_passes_of_training(new_job):
    job = new_job(
        batch_bytes=512,
        accumulate=4,
        valid_bytes=500,
        scorer={"batch_bytes": 1024},
    )
    data = load_data(job.corpus, job.settings, job.model)
    for batches, most in ((data.valid, 128), (data.calibration, 256)):
        sizes = [batch.rows.ids_br.numel() for batch in batches]
        assert most / 2 < max(sizes) <= most
        assert len(sizes) > 1


def test_held_out_text_of_a_scorer_alone_fits_into_its_own_passes(new_job, tables):
    for kind in ("encoder", "global_model", "decoder"):
        del tables[kind]
    job = new_job(steps=0, batch_bytes=64, scorer={"batch_bytes": 192})
    data = load_data(job.corpus, job.settings, job.model)
    assert max(batch.rows.ids_br.numel() for batch in data.valid) > 64
    assert "\n" not in data.summary, "no step of the model is too large, for there is none"


def test_steps_that_exceed_their_size_are_told(new_job):
    def told(**train) -> list[str]:
        job = new_job(**train)
        return load_data(job.corpus, job.settings, job.model).summary.splitlines()[1:]

    assert told(accumulate=4) == []
    (said, fix) = told(accumulate=8, scorer={"batch_bytes": 512})
    assert said == (
        "train.batch_bytes: a pass takes a whole window of 64 bytes, more than its 32, "
        "so steps have up to 512"
    )
    assert fix == "  fix: raise it to 512, or lower train.accumulate or train.context_bytes"
    (said, _) = told(context_bytes=50, scorer={"batch_bytes": 49})
    assert said.startswith("train.scorer.batch_bytes: a pass takes a whole window of 50 bytes, ")
