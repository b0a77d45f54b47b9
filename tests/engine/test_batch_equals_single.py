"""Invariant 5: a request in a batch gives the bytes, passes and rounds that it gives alone."""

from __future__ import annotations

import attrs
from hypothesis import given
from hypothesis import strategies as st

from blt_core.decoding.engine import Request
from blt_core.types import Sampling
from blt_plugins.sampling.diffusion import BlockDiffusion, BlockDiffusionParams
from tests.engine import models
from tests.engine.drafters import BlockSteps, Cascade
from tests.engine.runs import ar, counts, run, speculative, verified_in_law
from tests.engine.strategies import (
    batches,
    drafters,
    drafters_with_q,
    examples,
    model_indices,
    own_drafters,
    rules,
    samplings,
)


def record(progress):
    """All of a row's record but the timings."""
    return (
        bytes(progress.output),
        progress.ids,
        progress.stop_reason,
        counts(progress.passes),
        progress.rounds,
        progress.drafted,
        progress.accepted,
        progress.counts,
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


@examples(80)
@given(st.data(), model_indices, samplings)
def test_batches_of_the_package_s_drafters_equal_single_requests(data, index, sampling):
    batch = data.draw(batches(index, rows=4, sampling=sampling))
    same_alone(index, speculative(data.draw(own_drafters(index))), batch, sampling)


@examples(40)
@given(st.data(), model_indices, samplings, st.sampled_from(["rejection", "block"]))
def test_batches_that_are_verified_in_law_equal_single_requests(data, index, sampling, name):
    batch = data.draw(batches(index, rows=4, sampling=sampling))
    drafter = data.draw(drafters_with_q(index))
    same_alone(index, speculative(drafter, verified_in_law(name)), batch, sampling)


@examples(40)
@given(st.data(), model_indices, samplings, st.integers(2, 4))
def test_texts_that_begin_alike_equal_single_requests(data, index, sampling, copies):
    """Their prompt is read once, and yet each counts as if it were alone."""
    [request] = data.draw(batches(index, rows=1, sampling=sampling))
    batch = [attrs.evolve(request, seed=seed) for seed in range(copies)]
    batch += data.draw(batches(index, rows=2, sampling=sampling))
    sampler = data.draw(st.sampled_from(["ar", "speculative", "blt-d"]))
    if sampler == "blt-d" and index in models.DENOISING:
        params = BlockDiffusionParams(block_bytes=5, unmasking=data.draw(rules()))
        same_alone(index, BlockDiffusion(params, models.CONTEXT), batch, sampling)
    elif sampler == "speculative":
        same_alone(index, speculative(data.draw(own_drafters(index))), batch, sampling)
    else:
        same_alone(index, ar(), batch, sampling)


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
