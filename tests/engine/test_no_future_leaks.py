"""Invariant 3: perturbing bytes after i changes no row up to i and no flag up to i + 1."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.engine import models
from tests.engine.layouts import TOLERANCE, aligned_starts, flags_of, forward, noise, random_ids
from tests.engine.strategies import denoising_indices, examples, model_indices

seeds = st.integers(0, 2**16)


def other_bytes(ids, first, rng):
    """``ids`` with every byte from ``first`` on replaced by another one."""
    return ids[:first] + [(token + 1 + rng.randrange(255)) % 256 for token in ids[first:]]


@examples(60)
@given(model_indices, st.integers(2, 40), st.data(), seeds)
def test_later_bytes_change_no_row_and_no_flag(index, length, data, seed):
    model = models.model(index)
    ids = random_ids(model, length, seed)
    last = data.draw(st.integers(0, length - 2))
    changed = other_bytes(ids, last + 1, Random(seed))
    flags, changed_flags = flags_of(model, ids), flags_of(model, changed)
    assert flags[: last + 2] == changed_flags[: last + 2]
    rows = forward(model, ids, flags).clean.logits[0, : last + 1]
    changed_rows = forward(model, changed, changed_flags).clean.logits[0, : last + 1]
    assert_close(changed_rows, rows, **TOLERANCE)


@examples(60)
@given(model_indices, st.integers(2, 40), st.integers(1, 8), seeds)
def test_a_prefix_alone_gives_the_rows_of_the_whole_text(index, length, more, seed):
    model = models.model(index)
    ids = random_ids(model, length + more, seed)
    prefix, whole = flags_of(model, ids[:length]), flags_of(model, ids)
    assert prefix == whole[: length + 1]
    rows = forward(model, ids[:length], prefix).clean.logits[0]
    assert_close(forward(model, ids, whole).clean.logits[0, :length], rows, **TOLERANCE)


@examples(60)
@given(denoising_indices, st.integers(3, 40), st.integers(1, 9), st.data(), seeds)
def test_clean_bytes_from_its_start_on_change_nothing_in_a_block(index, length, size, data, seed):
    model, rng = models.model(index), Random(seed)
    ids = random_ids(model, length, seed)
    flags = flags_of(model, ids)
    start = data.draw(st.sampled_from(aligned_starts(flags, length)))
    block = noise(model, ids, start, size, rng)
    changed = other_bytes(ids, start, rng)
    want = forward(model, ids, flags, [block], [start]).blocks.logits
    got = forward(model, changed, flags_of(model, changed), [block], [start]).blocks.logits
    assert_close(got, want, **TOLERANCE)


@examples(60)
@given(denoising_indices, st.integers(4, 40), st.integers(1, 9), seeds)
def test_one_block_changes_neither_clean_rows_nor_other_blocks(index, length, size, seed):
    model, rng = models.model(index), Random(seed)
    ids = random_ids(model, length, seed)
    flags = flags_of(model, ids)
    starts = aligned_starts(flags, length)
    blocks = [noise(model, ids, start, size, rng) for start in starts]
    picked = rng.randrange(len(starts))
    changed = [*blocks]
    changed[picked] = [(token + 1) % 256 for token in blocks[picked]]
    alone = forward(model, ids, flags)
    want = forward(model, ids, flags, blocks, starts)
    got = forward(model, ids, flags, changed, starts)
    assert_close(want.clean.logits, alone.clean.logits, **TOLERANCE)
    assert_close(got.clean.logits, want.clean.logits, **TOLERANCE)
    others = [i for i in range(len(starts)) if i != picked]
    assert_close(got.blocks.logits[:, others], want.blocks.logits[:, others], **TOLERANCE)
    assert not (got.blocks.logits[:, picked] == want.blocks.logits[:, picked]).all()
