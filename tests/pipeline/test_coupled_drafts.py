"""Above temperature 0, drafts that share the draws of verification are right more often."""

from __future__ import annotations

import pytest
import torch

from blt_core import Pipeline
from blt_core.types import Sampling
from tests.nightly import nightly_or

PROMPTS = ["import os\n\ndef ", "class Stack:\n    def "]
REQUEST = {"temperature": 1.0, "max_new_bytes": nightly_or(40, 80), "seed": 7}


@pytest.fixture(scope="module")
def demo():
    torch.set_num_threads(1)
    return Pipeline.from_config({"schema": 1, "run": {"checkpoint": "demo:python"}})


@pytest.fixture(scope="module")
def own(demo):
    """The bytes of ar."""
    plain = demo.with_sampler("ar")
    return [plain.generate(prompt, **REQUEST).ids for prompt in PROMPTS]


class Uncoupled:
    """A drafter that is told to be greedy."""

    def __init__(self, inner):
        self.inner = inner

    def draft(self, ops, limit, sampling, draws):
        return self.inner.draft(ops, limit, Sampling(), draws)


def accepted(pipeline):
    results = [pipeline.generate(prompt, **REQUEST) for prompt in PROMPTS]
    return [result.ids for result in results], sum(result.accepted for result in results) / sum(
        result.drafted for result in results
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        "blt-s draft_bytes=8",
        "speculative drafter.use=cascade drafter.draft_bytes=8",
        "blt-dv block_bytes=8",
    ],
)
def test_drafts_that_share_the_draws_are_accepted_more_often(demo, own, sampler):
    coupled, uncoupled = demo.with_sampler(sampler), demo.with_sampler(sampler)
    uncoupled.sampler.drafter = Uncoupled(uncoupled.sampler.drafter)
    (first, share), (second, less) = accepted(coupled), accepted(uncoupled)
    assert first == second == own
    assert share > less
