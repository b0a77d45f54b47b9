"""Log-probabilities of texts and of outputs: one figure, wherever it is told."""

from __future__ import annotations

import json
import math

import pytest

from blt_core import Pipeline, RequestError
from blt_core.cli.app import run

VERIFIED = ("ar", "blt-s draft_bytes=5", "speculative drafter.use=cascade drafter.drafter.use=self")
TEXTS = [
    b"",
    b"a",
    b"the cat sat on the mat\n" * 9,
    bytes(range(256)) * 3,
    b"\xff" * 299,
    b"x" * 300,
]


@pytest.fixture(scope="module")
def exact(checkpoint):
    tables = {"schema": 1, "run": {"checkpoint": str(checkpoint), "dtype": "float64"}}
    return Pipeline.from_config(tables)


def evaluated(checkpoint, path, capsys, dtype):
    config = path.with_suffix(".toml")
    config.write_text(
        f'schema = 1\n[run]\ncheckpoint = "{checkpoint}"\ndtype = "{dtype}"\n', encoding="utf-8"
    )
    assert run(["evaluate", str(config), str(path), "--rounds", "0", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_sums_are_the_bits_per_byte_of_evaluate(checkpoint, exact, tmp_path, capsys, dtype):
    pipeline = (
        exact
        if dtype == "float64"
        else Pipeline.from_config({"schema": 1, "run": {"checkpoint": str(checkpoint)}})
    )
    for number, text in enumerate(TEXTS[1:]):  # windows of 300 bytes, also of exactly as many
        path = tmp_path / f"text{number}"
        path.write_bytes(text)
        found = pipeline.score(text)
        wanted = evaluated(checkpoint, path, capsys, dtype)["bits_per_byte"]
        assert found.bits_per_byte == pytest.approx(
            wanted, rel=1e-9 if dtype == "float64" else 1e-5
        )
        nats = sum(each.logprob for each in found.likelihoods)
        assert found.logprob == pytest.approx(nats + found.eos.logprob)
        assert found.bits_per_byte_without_eos == pytest.approx(-nats / math.log(2) / len(text))


def test_texts_in_a_batch_have_the_scores_that_they_have_alone(exact):
    together = exact.score(TEXTS, top=2)
    for text, found in zip(TEXTS, together, strict=True):
        alone = exact.score(text, top=2)
        assert (found.prompt, found.text, len(found.likelihoods)) == (b"", text, len(text))
        for one, other in zip(
            [*found.likelihoods, found.eos], [*alone.likelihoods, alone.eos], strict=True
        ):
            assert one.id == other.id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-9)
            assert [i for i, _ in one.top] == [i for i, _ in other.top]
    assert together[0].bits_per_byte is None


@pytest.mark.parametrize("prompt", [b"", b"th", b"\x00" * 120, b"p" * 299, b"q" * 450])
def test_a_continuation_has_the_scores_of_the_end_of_the_whole(exact, prompt):
    text = b"e cat sat on the mat\n" * 8
    fits = prompt[len(prompt) - min(len(prompt), 300 - len(text) - 1) :]
    found, whole = exact.score(text, prompts=prompt), exact.score(fits + text)
    assert len(found.likelihoods) == len(text)
    tail = whole.likelihoods[len(fits) :]
    for one, other in zip([*found.likelihoods, found.eos], [*tail, whole.eos], strict=True):
        assert (one.id, one.logprob) == (other.id, pytest.approx(other.logprob, abs=1e-9))


def test_prompts_are_one_for_all_or_one_for_each(exact):
    both = exact.score(["a", "b"], prompts="x")
    assert [each.prompt for each in both] == [b"x", b"x"]
    assert exact.score(["a", "b"], prompts=["x", "y"])[1].prompt == b"y"
    with pytest.raises(RequestError, match="prompts: 1 for 2 texts; give one or as many"):
        exact.score(["a", "b"], prompts=["x"])
    with pytest.raises(RequestError, match="top: expected a whole number, 0 or more"):
        exact.score("a", top=-1)


def test_the_likeliest_come_first_and_the_own_is_among_all(exact):
    found = exact.score("some text", top=259)
    for each in found.likelihoods:
        values = [value for _, value in each.top]
        assert values == sorted(values, reverse=True)
        assert math.fsum(map(math.exp, values)) == pytest.approx(1, abs=1e-9)
        assert dict(each.top)[each.id] == each.logprob


@pytest.mark.parametrize("sampler", VERIFIED)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_logprobs_of_an_output_are_the_scores_of_that_text(exact, sampler, temperature):
    fast = exact.with_sampler(sampler)
    asked = {"max_new_bytes": 20, "temperature": temperature, "top_p": 0.9, "seed": 3}
    for result in fast.generate(["the cat", "x", ""], logprobs=3, samples=2, **asked):
        scored = exact.score(result.output, prompts=result.prompt, top=3)
        assert [each.id for each in result.likelihoods] == list(result.ids)
        for own, wanted in zip(result.likelihoods, scored.likelihoods, strict=True):
            assert own.logprob == pytest.approx(wanted.logprob, abs=1e-9)
            assert [i for i, _ in own.top] == [i for i, _ in wanted.top]
        assert (result.eos is None) == (result.stop_reason != "eos")
        record = result.to_dict()
        assert record["logprobs"] == [each.logprob for each in result.likelihoods]
        assert json.loads(json.dumps(record)) == record
    assert fast.generate("x", **asked).likelihoods is None
    assert "logprobs" not in fast.generate("x", **asked).to_dict()


def test_what_no_full_pass_predicts_has_no_logprobs(pipeline):
    class Guesses:
        def check(self, sampling): ...

        def round(self, ops, sampling, draws): ...

    other = pipeline.with_sampler("ar")
    other.sampler = Guesses()
    with pytest.raises(RequestError, match="outputs bytes that no full pass of the model predicts"):
        other.generate("a", logprobs=0)
    with pytest.raises(RequestError, match="logprobs: expected at least 0"):
        pipeline.generate("a", logprobs=-1)


def test_the_command_line_scores_files(checkpoint, tmp_path, capsysbinary, pipeline):
    paths = [tmp_path / "one", tmp_path / "two"]
    for path, text in zip(paths, (b"first", b"the second"), strict=True):
        path.write_bytes(text)
    command = ["score", *map(str, paths), "--checkpoint", str(checkpoint), "--prompt", "p"]
    assert run([*command, "--top", "2", "--json"]) == 0
    lines = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    wanted = pipeline.score([b"first", b"the second"], prompts="p", top=2)
    for line, path, found in zip(lines, paths, wanted, strict=True):
        assert (line["file"], line["bytes"]) == (str(path), len(found.text))
        assert line["logprob"] == pytest.approx(found.logprob)
        assert len(line["logprobs"]) == len(line["top_logprobs"]) == len(found.text)
    assert run(command) == 0
    shown = capsysbinary.readouterr().out.decode()
    assert all(f"{found.bits_per_byte:.4f}" in shown for found in wanted)
    assert run([*command[:1], str(tmp_path / "none"), "--checkpoint", str(checkpoint)]) == 2
    assert "No such file" in capsysbinary.readouterr().err.decode()


def test_the_command_line_scores_a_file_of_texts(checkpoint, tmp_path, capsysbinary):
    texts, out = tmp_path / "texts.jsonl", tmp_path / "out.jsonl"
    texts.write_text('{"text": "abc", "id": 1}\n{"prompt": "x", "text": "de"}\n')
    common = ["score", "--checkpoint", str(checkpoint), "--texts", str(texts)]
    assert run([*common, "--output", str(out), "--batch", "2", "--top", "1"]) == 0
    first, second = map(json.loads, out.read_text().splitlines())
    assert (first["index"], first["id"], first["bytes"]) == (0, 1, 3)
    assert (second["index"], len(second["logprobs"])) == (1, 2)
    for wrong in ([], ["--output", str(out), "file.txt"]):
        assert run([*common, *wrong]) == 2
    assert run(["score", "--checkpoint", str(checkpoint)]) == 2
    assert b"no text" in capsysbinary.readouterr().err
