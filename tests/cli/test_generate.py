from __future__ import annotations

import base64
import io
import json
import sys

import pytest

from blt_core.pipeline import Pipeline

FIELDS = {
    "text", "bytes_base64", "ids", "seed", "n_dec", "n_enc", "n_draft", "rounds", "drafted",
    "accepted", "accepted_rounds", "accepted_by_place", "bytes_per_round", "bytes_per_pass",
    "gigabytes", "cost", "cost_unit", "prefill_seconds", "seconds", "bytes_per_second",
    "stop_reason",
}  # fmt: skip


def records(outcome):
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_streams_exactly_the_new_bytes_to_stdout(blt, run_config):
    path = run_config()
    outcome = blt("generate", path, "--prompt", "def f", "--max-new-bytes", 20)
    expected = Pipeline.from_toml(path).generate("def f", max_new_bytes=20)
    assert outcome.code == 0
    assert outcome.out == expected.output
    assert f"{len(expected.output)} bytes" in outcome.err


def test_json_gives_one_complete_line_a_prompt(blt, run_config, tmp_path):
    (tmp_path / "p").write_bytes(b"\xff\x00 raw")
    outcome = blt(
        "generate", run_config(), "--prompt", "ab", "--prompt-file", tmp_path / "p",
        "--max-new-bytes", 12, "--json",
    )  # fmt: skip
    found = records(outcome)
    assert [set(record) for record in found] == [FIELDS, FIELDS]
    for record in found:
        assert len(base64.b64decode(record["bytes_base64"])) == 12
        assert record["n_dec"] == 12
        assert record["rounds"] == 11
        assert record["stop_reason"] == "length"


def test_sampler_option_gives_the_same_bytes_with_fewer_passes_of_the_big_parts(blt, run_config):
    common = ("generate", run_config(), "--prompt", "xyz", "--max-new-bytes", 30, "--json")
    [ar] = records(blt(*common, "--sampler", "ar"))
    [fast] = records(blt(*common, "--sampler", "blt-s draft_bytes=6"))
    assert fast["bytes_base64"] == ar["bytes_base64"]
    assert fast["n_enc"] <= 1 + fast["rounds"]
    assert fast["drafted"] > 0


def test_inline_spec_reaches_nested_tables(blt, run_config):
    spec = "speculative drafter.use=self drafter.draft_bytes=3 verification.use=greedy"
    [record] = records(
        blt("generate", run_config(), "--prompt", "x", "--max-new-bytes", 9, "--json",
            "--sampler", spec)
    )  # fmt: skip
    assert record["drafted"] <= 3 * record["rounds"]


def test_batch_gives_what_single_runs_give(blt, run_config):
    common = ("generate", run_config(), "--prompt", "a", "--prompt", "a longer one",
              "--max-new-bytes", 15, "--json", "--sampler", "blt-s")  # fmt: skip
    single, batched = records(blt(*common)), records(blt(*common, "--batch", 2))
    counted = ("bytes_base64", "n_dec", "n_enc", "rounds", "drafted", "accepted", "gigabytes")
    for one, other in zip(single, batched, strict=True):
        assert {k: one[k] for k in counted} == {k: other[k] for k in counted}


def test_sampling_options_and_seed_are_used(blt, run_config):
    common = (
        "generate",
        run_config(),
        "--prompt",
        "a",
        "--max-new-bytes",
        40,
        "--temperature",
        1.0,
    )
    first, again, other = (blt(*common, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other


def test_verified_samplers_sample_what_ar_samples(blt, run_config):
    drawn = ("generate", run_config(), "--prompt", "a", "--max-new-bytes", 60, "--temperature", 0.9,
             "--top-p", 0.95, "--seed", 3, "--sampler")  # fmt: skip
    own = blt(*drawn, "ar").out
    assert own != blt(*drawn[:6], "--sampler", "ar").out
    for sampler in (
        "blt-s draft_bytes=5",
        "speculative drafter.use=cascade drafter.drafter.use=self",
    ):
        assert blt(*drawn, sampler).out == own


def test_stop_ends_with_the_stop_string(blt, run_config):
    path = run_config()
    whole = blt("generate", path, "--prompt", "q", "--max-new-bytes", 40).out
    stop = whole[10:12].decode("latin-1")
    if not stop.isascii():
        stop = "".join(chr(b) for b in whole if 32 < b < 127)[:1]
    [record] = records(
        blt("generate", path, "--prompt", "q", "--max-new-bytes", 40, "--stop", stop, "--json")
    )
    output = base64.b64decode(record["bytes_base64"])
    assert record["stop_reason"] == "stop"
    assert output == whole[: whole.index(stop.encode()) + len(stop)]


@pytest.mark.parametrize("option", [(), ("--prompt-file", "-")])
def test_prompt_from_stdin(blt, run_config, monkeypatch, option):
    path = run_config()
    stdin = io.TextIOWrapper(io.BytesIO(b"piped \xfe"))
    monkeypatch.setattr(sys, "stdin", stdin)
    outcome = blt("generate", path, *option, "--max-new-bytes", 8)
    assert outcome.out == Pipeline.from_toml(path).generate(b"piped \xfe", max_new_bytes=8).output


def test_empty_prompt_is_served(blt, run_config):
    assert len(blt("generate", run_config(), "--prompt", "", "--max-new-bytes", 5).out) == 5


def test_a_file_of_prompts_gives_a_file_of_records(blt, run_config, tmp_path):
    lines = [{"prompt": "ab"}, {"prompt": "a longer one", "id": 7}, {"text": "no prompt"}]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "out.jsonl"
    prompts.write_text("".join(json.dumps(each) + "\n" for each in lines))
    common = ("generate", run_config(), "--max-new-bytes", 8)
    outcome = blt(*common, "--prompts", prompts, "--output", out, "--batch", 2)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert (outcome.code, outcome.out) == (1, b"")
    assert "1 of 3 items have an error" in outcome.err
    assert "line 3: expected one of the keys 'prompt' and 'prompt_base64'" in outcome.err
    assert set(found[1]) == {"index", "id", *FIELDS}
    [alone] = records(
        blt(*common, "--prompt", "a longer one", "--json", "--seed", found[1]["seed"])
    )
    assert alone["bytes_base64"] == found[1]["bytes_base64"]
    other = out.with_name("other.jsonl")
    blt(*common, "--prompts", prompts, "--output", other, "--executor", "local")
    assert [json.loads(line)["index"] for line in other.read_text().splitlines()] == [0, 1, 2]
    assert json.loads(other.read_text().splitlines()[1])["text"] == found[1]["text"]
    again = blt(*common, "--prompts", prompts, "--output", out)
    assert again.code == 2
    assert "is there already" in again.err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--prompts", "a.jsonl"), "goes with --output"),
        (("--output", "b.jsonl"), "goes with --prompts"),
        (("--prompt", "x", "--executor", "local"), "goes with --prompts"),
        (("--prompts", "a.jsonl", "--output", "b", "--prompt", "x"), "does not go with --prompt"),
    ],
)
def test_a_file_of_prompts_goes_with_an_output_alone(blt, run_config, options, text):
    outcome = blt("generate", run_config(), *options)
    assert outcome.code == 2
    assert text in " ".join(outcome.err.split())
