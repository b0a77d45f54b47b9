from __future__ import annotations

import pytest
import torch

from blt_core.compare import compare, explain
from blt_core.types import Rows, Sampling


def test_explain_finds_the_first_difference_and_the_margin_of_the_models_own_choice(pipeline):
    result = pipeline.generate("abc", max_new_bytes=20)
    output = result.ids
    wrong = (*output[:7], output[7] ^ 1, *output[8:])
    found = explain(pipeline.model, "abc", output, wrong)
    ids = torch.tensor([[256, *b"abc", *output[:7]]])
    rows = Rows(ids, (ids.shape[1],))
    flags = pipeline.model.patcher.flags(rows, None)
    logits = pipeline.model.forward(rows, flags).clean.logits[0, -1, :256]
    top = logits.topk(2).values
    assert found.first_difference == 7
    assert found.logit_margin == pytest.approx(float(top[0] - top[1]), abs=1e-5)
    assert found.flag_margin >= 0


def test_a_lossy_sampler_is_reported_as_different_and_not_as_a_near_tie(pipeline):
    rows = compare(
        pipeline, {"ar": "ar", "fast": "blt-s draft_bytes=3"}, ["ab", "cd"], max_new_bytes=15
    )
    assert rows[1].identical or rows[1].near_ties == len(rows[1].differences)
    noisy = pipeline.with_sampler("ar")
    first = pipeline.generate("ab", max_new_bytes=15).ids
    other = noisy.generate("ab", max_new_bytes=15, temperature=5.0, seed=1).ids
    assert not explain(pipeline.model, "ab", first, other).near_tie


def test_sampled_outputs_are_compared_by_how_close_the_draw_was(pipeline):
    request = {"max_new_bytes": 20, "temperature": 0.8, "top_k": 50, "seed": 4}
    samplers = {"ar": "ar", "fast": "blt-s draft_bytes=3"}
    rows = compare(pipeline, samplers, ["ab", "cd"], **request)
    assert rows[1].identical or rows[1].near_ties == len(rows[1].differences)
    drawn = pipeline.generate("ab", **request).ids
    other = pipeline.generate("ab", **{**request, "seed": 5}).ids
    settings = (Sampling(0.8, 50), 4)
    assert 0 < explain(pipeline.model, "ab", drawn, other, *settings).logit_margin < 100


@pytest.mark.parametrize("law", ["rejection", "block"])
def test_what_equals_ar_in_law_alone_is_not_compared_by_its_bytes(pipeline, law):
    samplers = {"ar": "ar", "law": f"speculative verification.use={law}"}
    drawn = compare(pipeline, samplers, ["ab"], max_new_bytes=30, temperature=1.0)[1]
    assert (drawn.in_law, drawn.identical, drawn.differences) == (True, None, ())
    greedy = compare(pipeline, samplers, ["ab"], max_new_bytes=30)[1]
    assert (greedy.in_law, greedy.identical) == (False, True)
    turned = dict(reversed(samplers.items()))
    assert compare(pipeline, turned, ["ab"], max_new_bytes=9, temperature=1.0)[1].identical is None
