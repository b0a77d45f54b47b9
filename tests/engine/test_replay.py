"""Invariant 7: above temperature 0 a verified sampler's output is AR's, for the same seed."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import zip_longest
from threading import Thread

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_core.decoding.engine import Request, decode
from blt_core.types import Draws, Sampling
from tests.engine import models
from tests.engine.drafters import Oracle, Recorded
from tests.engine.runs import (
    Traced,
    ar,
    ar_alone,
    ar_ids,
    cascade_drafter,
    rows_of,
    run,
    self_drafter,
    speculative,
)
from tests.engine.seen import saw
from tests.engine.strategies import (
    batches,
    drafters,
    examples,
    model_indices,
    own_drafters,
    samplings,
)


def replays_ar(index, batch, drafter, sampling):
    """Run ``drafter`` verified, compare each row with AR alone, and note what happened."""
    recorded = Recorded(drafter)
    trace = Traced(speculative(recorded))
    done = run(models.model(index), trace, batch, sampling)
    for request, got in zip(batch, done, strict=True):
        want = ar_alone(index, request, sampling)
        assert (got.ids, got.output, got.stop_reason) == (want.ids, want.output, want.stop_reason)
    for turn in (turn for row in rows_of(trace, recorded, len(batch)) for turn in row):
        saw("sampled draft accepted none", turn.draft and not turn.accepted)
        saw("sampled draft accepted some", 0 < turn.accepted < len(turn.draft))
        saw("sampled draft accepted all", turn.draft and turn.accepted == len(turn.draft))


@examples(60)
@given(st.data(), model_indices, samplings)
def test_any_drafter_replays_ar(data, index, sampling):
    batch = data.draw(batches(index, sampling=sampling))
    replays_ar(index, batch, data.draw(drafters(index, batch, sampling)), sampling)


@examples(80)
@given(st.data(), model_indices, samplings)
def test_drafters_that_share_the_draws_replay_ar(data, index, sampling):
    batch = data.draw(batches(index, sampling=sampling))
    replays_ar(index, batch, data.draw(own_drafters(index)), sampling)


@examples(60)
@given(st.data(), model_indices, samplings)
def test_cascades_draft_what_self_drafts_at_any_temperature(data, index, sampling):
    batch = data.draw(batches(index, sampling=sampling))
    inner, count, drafts = data.draw(own_drafters(index)), data.draw(st.integers(1, 16)), []
    for drafter in (cascade_drafter(count, inner), self_drafter(count)):
        recorded = Recorded(drafter)
        run(models.model(index), speculative(recorded), batch, sampling)
        drafts.append(recorded.drafts)
    assert drafts[0] == drafts[1]


@pytest.mark.parametrize("index", range(models.COUNT))
def test_a_draft_of_what_ar_draws_is_accepted_whole(index):
    request, sampling = Request(b"perfect ", 20, seed=index), Sampling(1.0, top_p=0.95)
    drafter = Recorded(Oracle({(0,): ar_ids(index, request, sampling)}, 6, errors=0.0, seed=0))
    trace = Traced(speculative(drafter))
    [done] = run(models.model(index), trace, [request], sampling)
    assert done.ids == ar_alone(index, request, sampling).ids
    for turn in rows_of(trace, drafter, 1)[0][:-1]:
        assert turn.accepted == len(turn.draft)


@examples(30)
@given(st.data(), model_indices, samplings)
def test_interleaved_runs_of_one_sampler_give_what_each_gives_alone(data, index, sampling):
    one, other = (data.draw(batches(index, sampling=sampling)) for _ in range(2))
    sampler, model = speculative(data.draw(own_drafters(index))), models.model(index)
    runs = [decode(model, sampler, batch, sampling) for batch in (one, other)]
    last = [None, None]
    for steps in zip_longest(*runs):
        last = [step or before for step, before in zip(steps, last, strict=True)]
    for batch, step in zip((one, other), last, strict=True):
        for request, got in zip(batch, step.progress, strict=True):
            assert list(got.ids) == list(ar_alone(index, request, sampling).ids)


def test_one_sampler_serves_threads_side_by_side():
    sampling, sampler = Sampling(0.8), speculative(cascade_drafter(8, self_drafter(4)))
    model = models.model(1)
    requests = [Request(bytes([65 + i]) * i, 24, seed=i) for i in range(4)]
    found = {}

    def generate(i):
        found[i] = list(run(model, sampler, [requests[i]], sampling)[0].ids)

    with ExitStack() as stack:
        for i in range(len(requests)):
            thread = Thread(target=generate, args=(i,))
            thread.start()
            stack.callback(thread.join)
    for i, request in enumerate(requests):
        assert found[i] == list(run(model, ar(), [request], sampling)[0].ids)


# -- draws ---------------------------------------------------------------------------------------


@examples(60)
@given(samplings, st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(1, 5), st.data())
def test_rows_are_drawn_alike_one_by_one_and_together(sampling, seed, position, rows, data):
    size = data.draw(st.integers(2, 300))
    logits = 3 * torch.randn(2, rows, size, dtype=torch.float64)
    draws = Draws((seed, seed ^ 1))
    together = sampling.picks(logits, [position, 7], [rows, rows - 1], draws)
    assert [len(ids) for ids in together] == [rows, rows - 1]
    for j in range(rows):
        alone = sampling.pick(logits[:, j], [position + j, 7 + j], [1, j < rows - 1], draws)
        assert alone == [together[0][j], together[1][j] if j < rows - 1 else -1]


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**40), st.integers(0, 3), st.integers(1, 40))
def test_noise_depends_on_seed_position_stream_and_id_alone(seed, position, stream, size):
    want = Draws((seed,)).noise(0, position, 1, size, stream)[0]
    assert want.shape == (size,)
    assert bool(want.isfinite().all())
    assert len(set(want.tolist())) == size
    longer = Draws((0, seed)).noise(1, position - 1, 3, size + 5, stream)
    assert torch.equal(longer[1, :size], want)
    for other in (
        Draws((seed,)).noise(0, position + 1, 1, size, stream),
        Draws((seed,)).noise(0, position, 1, size, stream + 1),
        Draws((seed + 1,)).noise(0, position, 1, size, stream),
    ):
        assert not bool((other[0] == want).any())


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_standard_gumbel(seed):
    noise = Draws((seed,)).noise(0, 0, 2_000, 50).flatten()
    share = torch.exp(-torch.exp(-noise)).sort().values  # uniform, then
    steps = torch.arange(1, len(share) + 1, dtype=torch.float64) / len(share)
    assert float((share - steps).abs().max()) < 1.63 / len(share) ** 0.5  # Kolmogorov, 1 %


@pytest.mark.parametrize("seed", range(3))
def test_picked_ids_follow_their_probabilities_and_zeros_never_come(seed):
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0], dtype=torch.float64)
    count = 4000
    logits = probs.log().expand(1, count, 6)
    [chosen] = Sampling(1.0).picks(logits, [0], [count], Draws((seed,)))
    assert set(chosen) == {1, 3, 4}
    for token in (1, 3, 4):
        share = float(probs[token])
        assert abs(chosen.count(token) - count * share) < 4 * (count * share * (1 - share)) ** 0.5


@examples(60)
@given(samplings, st.integers(0, 999), st.integers(0, 99))
def test_a_margin_is_how_far_logits_may_move_before_another_id_is_drawn(sampling, seed, position):
    torch.manual_seed(seed)
    logits, draws = 2 * torch.randn(12, dtype=torch.float64), Draws((seed,))
    margin = sampling.margin(logits, draws, position)
    [before] = sampling.pick(logits[None], [position], [1], draws)
    # Log-probabilities move by at most twice as much as logits do, over the temperature.
    nudge = 0.2 * margin * min(sampling.temperature, 1.0) * (torch.rand(12).double() - 0.5)
    assert sampling.pick((logits + nudge)[None], [position], [1], draws) == [before]
