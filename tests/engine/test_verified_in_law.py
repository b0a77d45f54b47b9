"""Rejection and block verification in the engine: ar's law, and ar's bytes where nothing is drawn.

tests/verification sums up all outcomes of the laws; here whole runs use them, with the drafters of
the package, whose q has to be what they draw from.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_core.decoding.engine import Request
from blt_core.types import Rows, Sampling
from blt_plugins.drafting.diffusion import DiffusionDrafter, DiffusionParams
from blt_plugins.unmasking.composed import LeftToRight, LeftToRightParams
from blt_plugins.unmasking.rules import Confidence, ConfidenceParams
from tests.engine import models
from tests.engine.drafters import Recorded
from tests.engine.runs import (
    adaptive_drafter,
    ar_alone,
    cascade_drafter,
    first_drafter,
    lookup_drafter,
    model_drafter,
    run,
    self_drafter,
    speculative,
    until_drafter,
    verified_in_law,
)
from tests.engine.strategies import (
    batches,
    drafters_with_q,
    examples,
    model_indices,
    samplings,
)

LAWS = ("rejection", "block")


@examples(60)
@given(st.data(), model_indices, st.sampled_from(LAWS))
def test_greedy_output_is_ar_s(data, index, law):
    batch = data.draw(batches(index))
    sampler = speculative(data.draw(drafters_with_q(index)), verified_in_law(law))
    for request, got in zip(batch, run(models.model(index), sampler, batch), strict=True):
        want = ar_alone(index, request)
        assert (got.ids, got.output, got.stop_reason) == (want.ids, want.output, want.stop_reason)


@examples(60)
@given(st.data(), model_indices, samplings)
def test_the_q_of_a_draft_is_a_law_that_can_give_its_ids(data, index, sampling):
    batch = data.draw(batches(index, sampling=sampling))
    recorded = Recorded(data.draw(drafters_with_q(index)))
    seen = []

    class Looking:
        draws_of_round = True

        def __init__(self, inner):
            self.inner = inner

        def check(self, sampling): ...

        def accept(self, draft, logits, *rest):
            for row, ids in enumerate(draft.ids):
                q = draft.probs(row, models.model(index).scheme.size)
                assert q.dtype == torch.float64
                assert q.shape[0] == len(ids)
                assert torch.allclose(q.sum(-1), torch.ones(len(ids), dtype=q.dtype), atol=1e-12)
                seen.extend(float(q[place, token]) for place, token in enumerate(ids))
            return self.inner.accept(draft, logits, *rest)

    run(
        models.model(index),
        speculative(recorded, Looking(verified_in_law("rejection"))),
        batch,
        sampling,
    )
    assert all(each > 0 for each in seen)


#: Two ids a place, so that four bytes have sixteen outcomes.
TWO = Sampling(1.3, top_k=2)
BYTES, TEXTS = 4, 1500


@cache
def law_of_ar(index: int, prompt: bytes) -> dict[tuple[int, ...], float]:
    """The probability of each text of BYTES ids, by the plain forward pass."""
    model = models.model(index)
    found = {(): 1.0}
    for _ in range(BYTES):
        grown = {}
        for text, reached in found.items():
            if text[-1:] == (model.scheme.eos,):
                grown[text] = grown.get(text, 0.0) + reached
                continue
            ids = [model.scheme.bos, *model.scheme.encode(prompt), *text]
            rows = Rows(torch.tensor([ids]), (len(ids),))
            logits = model.forward(rows, model.patcher.flags(rows, None)).clean.logits[0, -1]
            logits[list(model.scheme.never_output)] = float("-inf")
            probs = TWO.probabilities(logits)
            for token in probs.nonzero().flatten().tolist():
                grown[(*text, token)] = reached * float(probs[token])
        found = grown
    return found


#: The model of the pool.
INDEX = 2

DRAFTERS = {
    "self": lambda: self_drafter(3),
    "cascade": lambda: cascade_drafter(3, self_drafter(1)),
    "until": lambda: until_drafter(0.6, self_drafter(3)),
    "first": lambda: first_drafter([lookup_drafter(2), self_drafter(2)]),
    "adaptive": lambda: adaptive_drafter(3, self_drafter(3)),
    "model": lambda: model_drafter(INDEX, 4, 3),
    "left to right": lambda: DiffusionDrafter(
        DiffusionParams(
            block_bytes=4,
            unmasking=LeftToRight(
                LeftToRightParams(rule=Confidence(ConfidenceParams(alpha=0.4), models.CONTEXT)),
                models.CONTEXT,
            ),
        ),
        models.CONTEXT,
    ),
}


#: Drafters whose law under ``rejection`` the contract ``drafter.law`` counts in the plain run.
COUNTED = ("self", "cascade", "until", "first", "adaptive")
LATER = pytest.mark.nightly(reason="test_it_keeps_its_contracts counts as much, by drafter.law")


@pytest.mark.parametrize(
    ("name", "law"),
    [
        pytest.param(
            name, law, marks=[LATER] if (law, name in COUNTED) == ("rejection", True) else []
        )
        for name in DRAFTERS
        for law in LAWS
    ],
)
def test_texts_come_as_often_as_ar_s(name, law):
    index, prompt = INDEX, b"the the the "
    model, wanted = models.model(index), law_of_ar(index, prompt)
    batch = [Request(prompt, BYTES, seed=seed) for seed in range(TEXTS)]
    done = run(model, speculative(DRAFTERS[name](), verified_in_law(law)), batch, TWO)
    ended = model.scheme.eos
    found = Counter((*each.ids, ended) if each.stop_reason == "eos" else each.ids for each in done)
    assert set(found) <= set(wanted)
    # Chi-squared over the outcomes that are expected at least five times, the rest as one.
    often = {text: p * TEXTS for text, p in wanted.items() if p * TEXTS >= 5}
    rest = TEXTS - sum(often.values())
    terms = [(found[text] - count) ** 2 / count for text, count in often.items()]
    if rest >= 5:
        other = TEXTS - sum(found[text] for text in often)
        terms.append((other - rest) ** 2 / rest)
    assert sum(terms) < 2.2 * len(terms) + 12, sorted(found.items())
