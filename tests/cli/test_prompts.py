"""What is read of a prompt file and of stdin, and notes on options that do nothing."""

from __future__ import annotations

import io
import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from blt_core.cli import inputs
from blt_core.errors import DataError, RequestError
from tests.forks import BLT, forks

#: Of the tiny model.
CONTEXT = 300
LONG = (
    f"more than {CONTEXT} bytes exceed the model's context of {CONTEXT} bytes. Shorten the prompt"
)


def refused(outcome, *parts):
    assert (outcome.code, outcome.out) == (2, b"")
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err


# -- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [("--prompt-file", "/dev/zero"), ()], ids=["file", "stdin"])
def test_a_file_without_an_end_is_refused_like_any_that_is_too_long(run_config, option):
    with Path("/dev/zero").open("rb") as endless:
        done = forks().run(BLT, ["generate", run_config(), *option], stdin=endless)
    assert (done.returncode, done.stdout) == (2, b"")
    said = done.stderr.decode()
    assert f"{option[-1] if option else 'stdin'}: {LONG}" in said
    assert "Traceback" not in said


class Endless(io.RawIOBase):
    """A stream of zeros that counts what was read, in pieces of at most ``most`` bytes."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        size = min(len(buffer), self.most)
        buffer[:size] = bytes(size)
        self.taken += size
        return size


@pytest.mark.parametrize("most", [7, 1 << 30])
def test_no_more_than_the_context_and_a_byte_is_read(monkeypatch, most):
    source = Endless(most)
    opened = []
    monkeypatch.setattr(Path, "open", lambda *_, **how: opened.append(how) or source)
    with pytest.raises(RequestError, match=LONG):
        inputs.read_prompts(None, [__file__], CONTEXT)
    assert source.taken == CONTEXT + 1
    assert opened == [{"buffering": 0}]  # a buffer would read ahead of what it is asked for


def test_a_huge_context_reserves_no_memory_for_a_small_file(tmp_path):
    (tmp_path / "p").write_bytes(b"small")
    assert inputs.read_prompts(None, [str(tmp_path / "p")], 1 << 60) == [b"small"]


@pytest.mark.parametrize("size", [0, 1, CONTEXT, CONTEXT + 1])
def test_files_are_read_whole_up_to_the_context(tmp_path, size):
    data = bytes(i % 256 for i in range(size))
    (tmp_path / "p").write_bytes(data)
    if size > CONTEXT:
        with pytest.raises(RequestError, match="Shorten the prompt"):
            inputs.read_prompts(None, [str(tmp_path / "p")], CONTEXT)
    else:
        assert inputs.read_prompts(None, [str(tmp_path / "p")], CONTEXT) == [data]


def test_texts_come_before_files_and_each_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "p").write_bytes(b"\xff\r\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped\r\n")))
    files = [str(tmp_path / "p"), "-"]
    expected = [b"\xfe", b"", b"\xff\r\n", b"piped\r\n"]
    assert inputs.read_prompts(["\udcfe", ""], files, CONTEXT) == expected
    with pytest.raises(RequestError, match=r"prompt 2.*no character"):
        inputs.read_prompts(["a", "\ud800"], None, CONTEXT)


def test_what_cannot_be_read_is_named(blt, run_config, tmp_path):
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file")):
        refused(blt("generate", run_config(), "--prompt", "a", "--prompt-file", path),
                f"{path}: the prompt file cannot be read: {reason}")  # fmt: skip


def test_a_named_pipe_is_refused_at_once_and_an_open_one_is_read(blt, run_config, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused(blt("generate", run_config(), "--prompt-file", pipe),
            f"{pipe}: the prompt file is a named pipe. Pass it as stdin: < {pipe}")  # fmt: skip
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        file.write(b"of a command")
    try:
        assert inputs.read_prompts(None, [f"/dev/fd/{reading}"], CONTEXT) == [b"of a command"]
    finally:
        os.close(reading)


def test_no_prompt_at_all_says_how_to_give_one(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="no prompt: give --prompt TEXT or --prompt-file FILE"):
        inputs.read_prompts(None, None, CONTEXT)
    with pytest.raises(DataError, match="stdin is closed"):
        inputs.read_prompts(None, ["-"], CONTEXT)


# -- notes ---------------------------------------------------------------------------------------

OPTIONS = {"--top-k": 3, "--top-p": 0.5, "--seed": 7}
SHORT = ("--prompt", "a", "--max-new-bytes", 3)


def notes(outcome):
    assert outcome.code == 0, outcome.err
    assert b"note" not in outcome.out
    return [line for line in outcome.err.splitlines() if "temperature 0" in line]


@pytest.mark.parametrize("command", ["generate", "compare"])
@pytest.mark.parametrize("as_json", [(), ("--json",)], ids=["text", "json"])
def test_options_that_do_nothing_at_temperature_0_are_noted(blt, run_config, command, as_json):
    common = (command, run_config(), *SHORT, "--sampler", "ar", *as_json)
    assert notes(blt(*common)) == []
    for option, value in OPTIONS.items():
        noted = notes(blt(*common, option, value))
        assert noted == [f"note: {option} does nothing at temperature 0"]
        assert notes(blt(*common, option, value, "--temperature", 0.5)) == []
    every = [part for pair in OPTIONS.items() for part in pair]
    outcome = blt(*common, *every)
    assert notes(outcome) == ["note: --top-k, --top-p, --seed do nothing at temperature 0"]
    if as_json:
        assert [type(json.loads(line)) for line in outcome.out.splitlines()] == [dict]


def test_a_seed_of_random_weights_does_something(blt, tmp_path):
    import tomli_w

    from tests.tiny import config

    path = tmp_path / "random.toml"
    path.write_text(tomli_w.dumps(config()))
    assert notes(blt("generate", path, *SHORT, "--seed", 3)) == []
    noted = notes(blt("generate", path, *SHORT, "--seed", 3, "--top-k", 2))
    assert noted == ["note: --top-k does nothing at temperature 0"]


def test_compare_draws_with_top_k_and_top_p(blt, run_config):
    def texts(*options):
        outcome = blt("compare", run_config(), "--prompt", "ab", "--max-new-bytes", 24,
                      "--sampler", "ar", "--sampler", "blt-s draft_bytes=4", "--json",
                      "--temperature", 1.5, "--seed", 3, *options)  # fmt: skip
        assert outcome.code == 0, outcome.err
        rows = json.loads(outcome.out)["samplers"]
        assert all(row["identical_to_ar"] or row["near_ties"] for row in rows)
        return rows[0]["per_prompt"][0]["ids"]

    free, few, head = texts(), texts("--top-k", 1), texts("--top-p", 0.01)
    greedy = blt("generate", run_config(), "--prompt", "ab", "--max-new-bytes", 24, "--json")
    assert few == head == json.loads(greedy.out)["ids"]
    assert free != few
    assert all(one != other for one, other in pairwise([texts("--top-k", 20), free, few]))
    for option, value in (("--top-k", 0), ("--top-p", 0), ("--top-p", 2)):
        refused(blt("compare", run_config(), *SHORT, option, value), option[2:])
