"""Full forwards equal transformers' own at every position."""

from __future__ import annotations

from random import Random

import pytest
import torch

from blt_core.types import Rows
from tests.huggingface import published

TOLERANCE = 1e-4


@torch.inference_mode()
def own_logits(pipeline, text):
    """(r, V) and the flags of a text's full forward."""
    model = pipeline.model
    ids = torch.tensor([published.encode(text)])
    rows = Rows(ids, (ids.shape[1],))
    flags = model.patcher.flags(rows, None)
    return model.forward(rows, flags).clean.logits[0], flags[0]


@pytest.mark.parametrize("name", published.SHAPES)
def test_logits_equal_those_of_transformers_at_every_position(name, pipeline_of):
    pipeline, reference = pipeline_of(name), published.reference(name)
    rng, sizes = Random(3), set()
    texts = [*published.prompts(), bytes(rng.randrange(256) for _ in range(500)), b"ab " * 100]
    for text in texts:
        found, flags = own_logits(pipeline, text)
        torch.testing.assert_close(found, published.logits(reference, text), rtol=0, atol=TOLERANCE)
        sizes |= set(flags.nonzero().flatten().diff().tolist())
    assert len(sizes) > 3, "patches of few sizes show little"


@pytest.mark.parametrize("name", published.SHAPES)
def test_cached_decoding_equals_full_forwards_of_transformers(name, pipeline_of):
    """The logits of every byte that AR decodes with caches, along its own output."""
    from blt_core.decoding.state import DecodeState

    pipeline, reference = pipeline_of(name), published.reference(name)
    model, prompt = pipeline.model, b"caches: \xe2\x82\xac"
    text = prompt + bytes(Random(5).randrange(256) for _ in range(80))
    want = published.logits(reference, text)
    with torch.inference_mode():
        state = DecodeState(model, [model.scheme.encode(prompt)], [80])
        for at in range(len(prompt), len(text)):
            found = state.next_logits([1])[0, 0]
            torch.testing.assert_close(found, want[at], rtol=0, atol=TOLERANCE)
            state.append([model.scheme.encode(text[at : at + 1])])
            state.settle()
