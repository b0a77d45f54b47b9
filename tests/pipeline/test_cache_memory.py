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
    """Bytes of all lanes while a batch of prompts is decoded: the most so far, and at the end."""
    caches, most, made, write = [], [0], RowCache.__init__, RowCache.write

    def note(cache, *arguments, **keys):
        made(cache, *arguments, **keys)
        caches.append(cache)

    def weigh(cache, *arguments, **keys):
        write(cache, *arguments, **keys)
        most[0] = max(most[0], sum(each.nbytes for each in caches))

    monkeypatch.setattr(RowCache, "__init__", note)
    monkeypatch.setattr(RowCache, "write", weigh)
    text = b"".join(b"value_%d = call(%d)\n" % (i, i * i) for i in range(LONG))
    steps = pipeline.with_sampler("blt-s").steps([text[:n] for n in lengths], max_new_bytes=30)
    for number, _ in enumerate(steps):
        if number == 3:  # some rounds after the prompt
            return most[0], sum(cache.nbytes for cache in caches)
    raise AssertionError("the model ended too early")


def test_a_long_prompt_takes_little_more_than_the_windows_and_leaves_less(pipeline, monkeypatch):
    model = pipeline.model
    stacks = (model.patcher.byte_scorer.stack, model.encoder.stack, model.global_model.stack)
    need = 0
    for part in (*stacks, model.decoder):
        width = 2 * part.layers[0].attention.kv_heads * part.head_dim
        need += part.window * len(part.layers) * width * 4
    # All of its byte states are kept until its patches are embedded, and its n-grams' ids.
    whole = (model.encoder.stack.layers[0].mlp.down.weight.shape[0] * 4 + 8) * 2 * LONG
    most, after = lanes_after(pipeline, monkeypatch, [LONG])
    assert after <= 2 * need
    assert most <= 2 * need + whole


def test_a_batch_holds_as_much_for_each_row_however_ragged(pipeline, monkeypatch):
    _, alone = lanes_after(pipeline, monkeypatch, [LONG])
    assert lanes_after(pipeline, monkeypatch, [10, LONG])[1] == 2 * alone
