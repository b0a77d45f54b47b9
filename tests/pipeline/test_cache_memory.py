"""What caches hold of a long prompt is bounded by windows, whoever else is in a batch."""

from __future__ import annotations

import pytest

from blt_core import Pipeline
from blt_core.nn import RowCache

LONG = 3900


@pytest.fixture(scope="module")
def pipeline():
    """The demo model, all of whose parts have windows."""
    return Pipeline.from_config({"schema": 1, "run": {"checkpoint": "demo:python"}})


def lanes_after(pipeline, monkeypatch, lengths):
    """Bytes of all lanes while a batch of prompts of these lengths is decoded."""
    caches, made = [], RowCache.__init__

    def note(cache, *arguments, **keys):
        made(cache, *arguments, **keys)
        caches.append(cache)

    monkeypatch.setattr(RowCache, "__init__", note)
    text = b"".join(b"value_%d = call(%d)\n" % (i, i * i) for i in range(LONG))
    steps = pipeline.with_sampler("blt-s").steps([text[:n] for n in lengths], max_new_bytes=30)
    for number, _ in enumerate(steps):
        if number == 3:  # some rounds after the prompt
            return sum(cache.nbytes for cache in caches)
    raise AssertionError("the model ended too early")


def test_a_long_prompt_leaves_little_more_than_the_windows(pipeline, monkeypatch):
    model = pipeline.model
    stacks = (model.patcher.byte_scorer.stack, model.encoder.stack, model.global_model.stack)
    need = 0
    for part in (*stacks, model.decoder):
        width = 2 * part.layers[0].attention.kv_heads * part.head_dim
        need += part.window * len(part.layers) * width * 4
    assert lanes_after(pipeline, monkeypatch, [LONG]) <= 2 * need


def test_a_batch_holds_as_much_for_each_row_however_ragged(pipeline, monkeypatch):
    alone = lanes_after(pipeline, monkeypatch, [LONG])
    assert lanes_after(pipeline, monkeypatch, [10, LONG]) == 2 * alone
