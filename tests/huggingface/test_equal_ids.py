"""Greedy generation gives the ids that transformers gives without its cache."""

from __future__ import annotations

import pytest

from blt_core.compare import compare
from blt_core.errors import ConfigError
from tests.huggingface import published

COUNT = 64


def ids_of(result):
    """The ids of an output, with the EOS that ended it."""
    return [*result.ids, *([published.EOS] if result.stop_reason == "eos" else [])]


@pytest.mark.slow
@pytest.mark.parametrize("name", published.SHAPES)
def test_ids_equal_those_of_transformers(name, pipeline_of):
    pipeline, reference = pipeline_of(name, max_new_bytes=COUNT), published.reference(name)
    assert len(published.prompts()) == 20
    outputs = set()
    for prompt in published.prompts():
        found = ids_of(pipeline.generate(prompt))
        assert found == published.generated(reference, prompt, COUNT)
        outputs.add(tuple(found))
        assert len(set(found)) > 5, "an output of few bytes shows little"
    assert len(outputs) > 10


@pytest.mark.parametrize("draft_bytes", [1, 4, 8, 16])
@pytest.mark.parametrize("name", published.SHAPES)
def test_drafts_of_the_decoder_change_no_id(name, draft_bytes, pipeline_of):
    pipeline = pipeline_of(name, max_new_bytes=COUNT)
    drafting = pipeline.with_sampler(f"blt-s draft_bytes={draft_bytes}")
    found = drafting.generate(published.prompts())
    for want, got in zip(pipeline.generate(published.prompts()), found, strict=True):
        assert (got.ids, got.stop_reason) == (want.ids, want.stop_reason)
    assert 0 < sum(got.accepted for got in found) < sum(got.drafted for got in found)


@pytest.mark.parametrize("name", ["plain", "three hashes"])
def test_in_bfloat16_drafts_part_from_ar_at_near_ties_alone(name, pipeline_of):
    pipeline = pipeline_of(name, max_new_bytes=COUNT, dtype="bfloat16")
    samplers = {"ar": "ar", "drafts": "blt-s draft_bytes=8"}
    _, drafts = compare(pipeline, samplers, published.prompts()[:10])
    assert drafts.near_ties == len(drafts.differences) < 10


@pytest.mark.parametrize("sampler", ["ar", "blt-s draft_bytes=5"])
@pytest.mark.parametrize("name", ["plain", "projection, small windows"])
def test_a_batch_of_unequal_prompts_equals_single_runs(name, sampler, pipeline_of):
    pipeline = pipeline_of(name, max_new_bytes=40).with_sampler(sampler)
    prompts = published.prompts()
    for prompt, found in zip(prompts, pipeline.generate(prompts), strict=True):
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
    results = [pipeline.generate(prompt) for prompt in published.prompts()]
    specials = {token for result in results for token in result.ids if token < published.OFFSET}
    assert specials == {0, 1, 3}
    for result in results:
        shown = bytes(t - published.OFFSET for t in result.ids if t >= published.OFFSET)
        assert result.output == shown
        assert len(result.ids) == COUNT or result.stop_reason == "eos"
