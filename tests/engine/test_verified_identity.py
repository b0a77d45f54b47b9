"""Invariant 1: a verified sampler's greedy output is byte-identical to AR's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt_core.decoding.engine import Request
from tests.engine import models
from tests.engine.drafters import BlockSteps, Oracle, Recorded
from tests.engine.runs import (
    Traced,
    ar_alone,
    ar_ids,
    observe,
    rows_of,
    run,
    self_drafter,
    speculative,
)
from tests.engine.strategies import batches, block_drafters, drafters, examples, model_indices


def same_as_ar(index, batch, drafter):
    """Run ``drafter`` verified, compare each row with AR alone, and note what happened."""
    model, recorded = models.model(index), Recorded(drafter)
    trace = Traced(speculative(recorded))
    done = run(model, trace, batch)
    for request, got in zip(batch, done, strict=True):
        want = ar_alone(index, request)
        assert got.ids == want.ids
        assert got.output == model.scheme.decode(want.ids)
        assert got.stop_reason == want.stop_reason
    rows = rows_of(trace, recorded, len(batch))
    observe(index, batch, rows, done)
    return rows


@examples(150)
@given(st.data(), model_indices)
def test_any_drafter_verified_equals_ar(data, index):
    batch = data.draw(batches(index))
    same_as_ar(index, batch, data.draw(drafters(index, batch)))


@examples(50)
@given(st.data(), st.sampled_from(models.DENOISING), block_drafters())
def test_block_drafts_verified_equal_ar(data, index, drafter):
    same_as_ar(index, data.draw(batches(index)), drafter)


@pytest.mark.parametrize("count", range(1, 17))
def test_self_drafts_of_each_length_verified_equal_ar(count):
    same_as_ar(count, [Request(b"the cat", 24), Request(b"\x00\xff", 17)], self_drafter(count))


@pytest.mark.parametrize("index", range(models.COUNT))
def test_a_perfect_draft_is_accepted_whole(index):
    request = Request(b"perfect ", 20)
    ids = ar_ids(index, request)
    rows = same_as_ar(index, [request], Oracle({(0,): ids}, 6, errors=0.0, seed=0))
    right = [turn.accepted == len(turn.draft) for turn in rows[0][:-1]]
    assert all(right), "only what stands after the end of AR's text may be rejected"


@pytest.mark.parametrize("index", range(models.COUNT))
def test_a_draft_over_the_end_of_the_text_is_dropped_after_it(index):
    request = Request(b"ends ", 20)
    text = bytes(ar_alone(index, request).output)
    stop = (text[len(text) // 2 :][:2],) if len(text) > 1 else ()
    drafter = Oracle({(0,): ar_ids(index, request)}, 16, errors=0.0, seed=0)
    same_as_ar(index, [request], drafter)
    same_as_ar(index, [Request(b"ends ", 20, stop)], drafter)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("index", models.DENOISING[:6])
def test_aligned_blocks_beside_fallbacks_verified_equal_ar(index, size):
    batch = [Request(b"a b c", 16), Request(b"", 12), Request(b"\xff" * 11, 9)]
    same_as_ar(index, batch, BlockSteps(size, 1, "aligned", "none"))
