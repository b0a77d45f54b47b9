"""Which ids temperature, top-k and top-p leave, with ties; and what greedy is."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_core.errors import RunError
from blt_core.types import Draws, Sampling
from tests.engine import models
from tests.engine.runs import ar, ar_alone, cascade_drafter, run, self_drafter, speculative
from tests.engine.strategies import examples, model_indices, requests

#: Few values, so that many are equal.
tied = st.lists(st.integers(-3, 3).map(lambda n: n / 2), min_size=1, max_size=20)
#: Also those at which differences vanish, or overflow.
temperatures = st.sampled_from([5e-324, 1e-300, 1e-3, 0.5, 1.0, 40.0, 1e9, 1e308])


def by_rank(logits):
    """Ids from the likeliest on; of equals the lowest first."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


@examples(100)
@given(tied, temperatures, st.one_of(st.none(), st.floats(0.01, 1.0)), st.integers(0, 99))
def test_top_k_of_one_is_greedy_at_any_temperature(logits, temperature, top_p, seed):
    row, first = torch.tensor(logits), Sampling(temperature, 1, top_p)
    assert torch.equal(first.probabilities(row), Sampling().probabilities(row))
    for sampling in (first, Sampling()):
        picked = sampling.picks(row.expand(1, 3, -1), [4], [3], Draws((seed,)))
        assert picked == [[by_rank(logits)[0]] * 3]


@examples(30)
@given(st.data(), model_indices, temperatures)
def test_texts_of_top_k_one_are_greedy_texts(data, index, temperature):
    request = data.draw(requests(index))
    want = ar_alone(index, request)
    for sampler in (ar(), speculative(cascade_drafter(6, self_drafter(3)))):
        [got] = run(models.model(index), sampler, [request], Sampling(temperature, 1))
        assert (got.ids, got.stop_reason) == (want.ids, want.stop_reason)


@examples(100)
@given(tied, st.sampled_from([0.2, 1.0, 40.0, 1e9, 1e308]), st.integers(1, 25))
def test_exactly_k_ids_keep_probability_and_of_equals_the_lowest(logits, temperature, top_k):
    probs = Sampling(temperature, top_k).probabilities(torch.tensor(logits))
    kept = probs.nonzero().flatten().tolist()
    assert kept == sorted(by_rank(logits)[: min(top_k, len(logits))])
    assert float(probs.sum()) == pytest.approx(1.0)


@examples(100)
@given(
    tied,
    st.sampled_from([0.2, 1.0, 40.0]),
    st.one_of(st.none(), st.integers(1, 25)),
    st.floats(0.01, 1.0),
)
def test_top_p_keeps_the_smallest_head_that_reaches_it(logits, temperature, top_k, top_p):
    sampling, row = Sampling(temperature, top_k, top_p), torch.tensor(logits)
    before = attrs.evolve(sampling, top_p=None).probabilities(row).tolist()
    probs = sampling.probabilities(row)
    kept = probs.nonzero().flatten().tolist()
    assert kept == sorted(by_rank(logits)[: len(kept)])
    ranked = [before[i] for i in by_rank(logits)]
    whole, shorter = sum(ranked[: len(kept)]), sum(ranked[: len(kept) - 1])
    assert whole >= top_p - 1e-9  # it reaches the mass
    assert shorter < top_p + 1e-9  # and nothing shorter does
    for i in kept:
        assert float(probs[i]) == pytest.approx(before[i] / whole)


def test_ties_are_cut_at_the_lowest_ids_whatever_their_order_and_number():
    logits = torch.zeros(259)
    assert Sampling(1.0, 40).probabilities(logits).nonzero().flatten().tolist() == list(range(40))
    half = Sampling(1.0, None, 0.5).probabilities(torch.zeros(256))
    assert half.nonzero().flatten().tolist() == list(range(128))
    both = Sampling(1.0, 4, 0.5).probabilities(torch.tensor([[0.0, 2, 2, 2, 2, 2]]))
    assert both.tolist() == [[0, 0.5, 0.5, 0, 0, 0]]


def test_logits_that_are_no_numbers_are_refused_however_they_are_read():
    logits = torch.zeros(1, 1, 5)
    logits[..., 3] = float("nan")
    for sampling in (Sampling(), Sampling(temperature=0.7), Sampling(temperature=1.0, top_k=2)):
        for read in (
            sampling.probabilities,
            sampling.belief,
            lambda x, s=sampling: s.picks(x, [4], [1], Draws((0,))),
        ):
            with pytest.raises(RunError, match="no numbers"):
                read(logits)
