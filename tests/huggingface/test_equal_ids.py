"""Greedy generation gives the ids that transformers gives without its cache."""

from __future__ import annotations

from functools import cache

import pytest

from blt_core.compare import compare
from blt_core.errors import ConfigError
from tests.huggingface import published
from tests.nightly import nightly_or

COUNT = 64


def ids_of(result):
    """The ids of an output, with the EOS that ended it."""
    return [*result.ids, *([published.EOS] if result.stop_reason == "eos" else [])]


@pytest.fixture(scope="module")
def greedy_of(pipeline_of):
    """A function from a model's name to what AR makes of all prompts, as one batch."""
    return cache(lambda name: pipeline_of(name, max_new_bytes=COUNT).generate(published.prompts()))


@pytest.mark.slow
@pytest.mark.parametrize("name", published.SHAPES)
def test_ids_equal_those_of_transformers(name, greedy_of):
    reference = published.reference(name)
    assert len(published.prompts()) == 20
    outputs = set()
    for prompt, result in zip(published.prompts(), greedy_of(name), strict=True):
        found = ids_of(result)
        assert found == published.chosen(reference, prompt, found)
        outputs.add(tuple(found))
        assert len(found) == COUNT or found[-1] == published.EOS
        assert len(set(found)) > 5, "an output of few bytes shows little"
    assert len(outputs) > 10


@pytest.mark.parametrize("name", published.SHAPES)
def test_ids_equal_those_that_transformers_generates(name, pipeline_of):
    """Its own loop, a forward for each byte: most of the time goes into that."""
    count, prompts = nightly_or((16, published.prompts()[::7]), (COUNT, published.prompts()))
    pipeline, reference = pipeline_of(name, max_new_bytes=count), published.reference(name)
    for prompt in prompts:
        found = ids_of(pipeline.generate(prompt))
        assert found == published.generated(reference, prompt, count)


#: Each shape with a size, and each size with a shape; all of them in a nightly run.
DRAFTS = nightly_or(
    [*zip(published.SHAPES, (1, 4, 8, 16, 4, 8), strict=True)],
    [(name, size) for name in published.SHAPES for size in (1, 4, 8, 16)],
)


@pytest.mark.parametrize(("name", "draft_bytes"), DRAFTS)
def test_drafts_of_the_decoder_change_no_id(name, draft_bytes, pipeline_of, greedy_of):
    pipeline = pipeline_of(name, max_new_bytes=COUNT)
    drafting = pipeline.with_sampler(f"blt-s draft_bytes={draft_bytes}")
    found = drafting.generate(published.prompts())
    for want, got in zip(greedy_of(name), found, strict=True):
        assert (got.ids, got.stop_reason) == (want.ids, want.stop_reason)
    assert 0 < sum(got.accepted for got in found) < sum(got.drafted for got in found)


@pytest.mark.parametrize("name", ["plain", "three hashes"])
def test_in_bfloat16_drafts_part_from_ar_at_near_ties_alone(name, pipeline_of):
    pipeline = pipeline_of(name, max_new_bytes=nightly_or(32, COUNT), dtype="bfloat16")
    samplers = {"ar": "ar", "drafts": "blt-s draft_bytes=8"}
    prompts = published.prompts()[: nightly_or(4, 10)]
    _, drafts = compare(pipeline, samplers, prompts)
    assert drafts.near_ties == len(drafts.differences) < len(prompts)


#: Each of two models with one of two samplers; with both in a nightly run.
BATCHED = nightly_or(
    [("plain", "blt-s draft_bytes=5"), ("projection, small windows", "ar")],
    [
        (name, sampler)
        for name in ("plain", "projection, small windows")
        for sampler in ("ar", "blt-s draft_bytes=5")
    ],
)


@pytest.mark.parametrize(("name", "sampler"), BATCHED)
def test_a_batch_of_unequal_prompts_equals_single_runs(name, sampler, pipeline_of):
    pipeline = pipeline_of(name, max_new_bytes=40).with_sampler(sampler)
    prompts = published.prompts()
    together = zip(prompts, pipeline.generate(prompts), strict=True)
    for prompt, found in list(together)[:: nightly_or(3, 1)]:
        alone = pipeline.generate(prompt)
        assert (found.ids, found.stop_reason) == (alone.ids, alone.stop_reason)
        assert (found.passes, found.drafted, found.accepted) == (
            alone.passes,
            alone.drafted,
            alone.accepted,
        )


def test_byte_passes_of_drafts_are_counted_and_priced(pipeline_of):
    pipeline = pipeline_of("plain", max_new_bytes=30).with_sampler("blt-s draft_bytes=4")
    result = pipeline.generate(b"counted")
    passes, sizes = result.passes, pipeline.parameter_counts
    # The decoder starts from the encoder's byte states: each of its passes needs one of those.
    assert passes.encoder_bytes == passes.decoder > passes.encoder > 0
    gb = 2 / 1e9
    assert result.cost.lines["encoder"] == pytest.approx(gb * passes.decoder * sizes.encoder)
    assert sizes.tables == 6 * 97 * 32


@pytest.mark.parametrize("sampler", ["blt-d block_bytes=4", "blt-dv block_bytes=4"])
def test_samplers_with_blocks_are_refused_before_any_work(sampler, pipeline_of):
    with pytest.raises(ConfigError, match="needs a decoder that denoises"):
        pipeline_of("plain").with_sampler(sampler)


def test_special_ids_stay_native_and_show_as_no_byte(pipeline_of):
    pipeline = pipeline_of("plain", max_new_bytes=COUNT)
    head = pipeline.model.decoder.head.weight
    head[[0, 1, 3]] = 2 * head[[0, 1, 3]]
    results = pipeline.generate(published.prompts())
    specials = {token for result in results for token in result.ids if token < published.OFFSET}
    assert specials == {0, 1, 3}
    for result in results:
        shown = bytes(t - published.OFFSET for t in result.ids if t >= published.OFFSET)
        assert result.output == shown
        assert len(result.ids) == COUNT or result.stop_reason == "eos"
