"""Invariant 5: a request in a batch gives the bytes, passes and rounds that it gives alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blt_core.decoding.engine import Request
from blt_core.types import Sampling
from tests.engine import models
from tests.engine.drafters import BlockSteps, Cascade
from tests.engine.runs import ar, run, speculative
from tests.engine.strategies import batches, drafters, examples, model_indices


def record(progress):
    """All of a row's record but the timings."""
    return (
        bytes(progress.output),
        progress.ids,
        progress.stop_reason,
        progress.passes,
        progress.rounds,
        progress.drafted,
        progress.accepted,
        progress.first_ids,
    )


def same_alone(index, sampler, batch, sampling):
    """Run a batch, then each of its requests alone."""
    model = models.model(index)
    together = run(model, sampler, batch, sampling)
    for request, got in zip(batch, together, strict=True):
        assert record(got) == record(run(model, sampler, [request], sampling)[0])


@examples(60)
@given(st.data(), model_indices)
def test_verified_batches_equal_single_requests(data, index):
    batch = data.draw(batches(index, rows=4))
    same_alone(index, speculative(data.draw(drafters(index, batch))), batch, Sampling())


@examples(40)
@given(
    st.data(),
    model_indices,
    st.floats(0.2, 3.0),
    st.one_of(st.none(), st.integers(1, 40)),
    st.one_of(st.none(), st.floats(0.1, 1.0)),
)
def test_sampled_batches_equal_single_requests(data, index, temperature, top_k, top_p):
    batch = data.draw(batches(index, rows=4))
    same_alone(index, ar(), batch, Sampling(temperature, top_k, top_p))


@examples(15)
@given(model_indices, st.integers(0, 3))
def test_sampled_bytes_follow_the_seed_of_their_request_alone(index, place):
    request, sampling = Request(b"seeded", 10, seed=5), Sampling(temperature=1.0)
    batch = [Request(b"", 7, seed=1), Request(b"other", 12, seed=5), Request(b"x", 3, seed=2)]
    batch.insert(place, request)
    model = models.model(index)
    alone = bytes(run(model, ar(), [request], sampling)[0].output)
    assert bytes(run(model, ar(), batch, sampling)[place].output) == alone
    reseeded = Request(b"seeded", 10, seed=6)
    assert bytes(run(model, ar(), [reseeded], sampling)[0].output) != alone


@examples(15)
@given(st.sampled_from(models.DENOISING), st.integers(3, 7), st.integers(1, 3))
def test_rows_that_cascade_beside_finished_rows_equal_single_requests(index, size, rounds):
    batch = [Request(b"", 2), Request(b"a long prompt, over any window", 24), Request(b"\x00", 11)]
    drafter = Cascade(BlockSteps(size, 1, "aligned", "none"), rounds)
    same_alone(index, speculative(drafter), batch, Sampling())
