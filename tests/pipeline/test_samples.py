"""Several texts of a prompt: each can be made alone, and the prompt is read once."""

from __future__ import annotations

import json

import pytest

from blt_core import Pipeline, RequestError
from blt_core.cli.app import run
from blt_core.decoding.engine import Request
from blt_core.decoding.state import DecodeState
from blt_core.types import Draws, Sampling

VERIFIED = ("ar", "blt-s draft_bytes=5", "speculative drafter.use=cascade drafter.drafter.use=self")
DRAWN = {"max_new_bytes": 14, "temperature": 1.0, "seed": 11}


def told(result):
    return (result.ids, result.output, result.stop_reason, result.passes, result.counts)


@pytest.mark.parametrize("sampler", VERIFIED)
def test_each_record_is_what_its_seed_gives_alone(pipeline, sampler):
    fast = pipeline.with_sampler(sampler)
    prompts = ["ab", "ab", "other", ""]
    results = fast.generate(prompts, samples=3, **DRAWN)
    assert [result.prompt for result in results] == [p.encode() for p in prompts for _ in range(3)]
    for result in results:
        alone = fast.generate(result.prompt, **{**DRAWN, "seed": result.seed})
        assert told(result) == told(alone)
    assert len({result.output for result in results}) == len(results), "each has its own draws"


def test_greedy_texts_are_all_the_same(pipeline):
    first, *others = pipeline.generate(["ab", "ab"], samples=2, max_new_bytes=14)
    assert all(other.output == first.output for other in others)


def test_who_asks_for_samples_gets_a_list_whatever_their_number(pipeline):
    assert pipeline.generate("a", max_new_bytes=2).output
    assert len(pipeline.generate("a", samples=1, max_new_bytes=2)) == 1
    assert len(pipeline.generate("a", samples=2, max_new_bytes=2)) == 2
    with pytest.raises(RequestError, match="samples: expected at least 1"):
        pipeline.generate("a", samples=0)
    with pytest.raises(RequestError, match="one text at a time can be streamed"):
        pipeline.stream("a", samples=2)


@pytest.mark.parametrize("prompts", [["same", "same", "same"], ["same", "other", "same"]])
def test_a_prompt_is_read_once_for_all_texts_that_begin_with_it(pipeline, prompts):
    model = pipeline.model
    state = DecodeState(model, [model.scheme.encode(p.encode()) for p in prompts], [9] * 3)
    read = []
    forward = model.decoder.forward

    def counting(clean, *arguments):
        read.append(len(clean.lengths))
        return forward(clean, *arguments)

    model.decoder.forward = counting
    try:
        sampler, draws = pipeline.sampler, Draws((1, 2, 3))
        for _ in range(4):
            sampler.round(state, Sampling(1.0), draws)
            state.settle()
    finally:
        del model.decoder.forward
    assert read == [len(set(prompts)), 3, 3, 3]
    alone = DecodeState(model, [model.scheme.encode(b"same")], [9])
    for _ in range(4):
        sampler.round(alone, Sampling(1.0), Draws((1,)))
        alone.settle()
    assert state.text(0) == alone.text(0)
    assert state.passes(0) == alone.passes(0), "each text counts as if it were alone"
    assert state.calls.decoder == 4


def test_the_command_line_prints_a_line_for_each_sample_with_its_seed(checkpoint, capsysbinary):
    asked = (
        "--checkpoint",
        str(checkpoint),
        "--max-new-bytes",
        "9",
        "--temperature",
        "1",
        "--json",
    )
    command = ("generate", "--prompt", "a", "--prompt", "b", "--samples", "2", "--seed", "5")
    found = {}
    for batch in ((), ("--batch", 2)):
        assert run([*command, *asked, *batch]) == 0
        lines = capsysbinary.readouterr().out.splitlines()
        found[batch] = [json.loads(line) for line in lines]
    for one, other in zip(*found.values(), strict=True):
        assert (one["seed"], one["ids"]) == (other["seed"], other["ids"])
    assert found[()][0]["seed"] == 5
    for record, prompt in zip(found[()], "aabb", strict=True):
        assert run(["generate", "--prompt", prompt, "--seed", str(record["seed"]), *asked]) == 0
        assert json.loads(capsysbinary.readouterr().out)["ids"] == record["ids"]


def test_compare_gives_each_prompt_draws_of_its_own(pipeline):
    from blt_core.compare import compare

    rows = compare(pipeline, {"ar": "ar", "blt-s": "blt-s"}, ["ab", "ab"], **DRAWN)
    assert rows[1].identical
    outputs = [result.output for result in rows[0].results]
    assert outputs == [r.output for r in pipeline.generate(["ab", "ab"], **DRAWN)]
    assert outputs[0] != outputs[1]


def test_a_request_tells_its_seed(pipeline: Pipeline):
    assert pipeline.requests("a", seed=3)[0] == Request(b"a", 256, (), 3)
