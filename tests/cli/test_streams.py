"""Processes: what is on stdout, closed and full streams, readers that go away, Ctrl-C.

Those that need no torch are started anew; the others are forks of one that has imported it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import BLT as MAIN
from tests.forks import forks, reading

BLT = [sys.executable, "-c", MAIN]


@pytest.fixture
def generate(run_config):
    return ["generate", str(run_config()), "--prompt", "x", "--max-new-bytes", "200"]


def shell(command, redirection):
    """Run a command with a shell's redirection: (code, stderr)."""
    line = " ".join(["exec", *("'" + part.replace("'", "'\\''") + "'" for part in command)])
    done = subprocess.run(
        ["sh", "-c", f"{line} {redirection}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stderr


@pytest.fixture
def error(tmp_path):
    """A file to be the stderr of a fork."""
    with (tmp_path / "error").open("w+") as file:
        yield file


def said(error) -> str:
    error.seek(0)
    return error.read()


def fork(arguments, out, error):
    """Run a command with these streams: (code, stderr)."""
    with Path(os.devnull).open() as nothing:
        code = forks().start(MAIN, arguments, streams=(nothing, out, error)).wait()
    return code, said(error)


def test_a_reader_that_has_enough_ends_the_run_quietly(generate, error):
    with reading() as (read, write), Path(os.devnull).open() as nothing:
        process = forks().start(MAIN, generate, streams=(nothing, write, error))
        write.close()
        read.read(1)
        read.close()
        assert process.wait() == 0
    assert said(error) == ""


def test_a_full_disk_is_one_message_and_exit_code_1(generate, error):
    with Path("/dev/full").open("wb") as full:
        code, error = fork(generate, full, error)
    assert code == 1
    assert "Traceback" not in error
    assert "cannot read or write" in error


#: Commands that end at once, each with a result; none of them imports torch.
QUICK = (("--help",), ("cost",), ("cost", "--n-dec", "512", "--n-enc", "128", "--json"))


def pipe(command):
    """Run a command whose reader has gone before it writes: (code, stderr)."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command, check=False, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300
    )
    os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", QUICK, ids=" ".join)
def test_every_command_ends_quietly_where_nobody_reads(command):
    assert pipe([*BLT, *command]) == (0, "")


@pytest.mark.parametrize("command", QUICK, ids=" ".join)
def test_every_command_says_that_the_disk_is_full(command):
    code, error = shell([*BLT, *command], "> /dev/full")
    assert (code, error.count("\n")) == (1, 1), error
    assert "No space left on device" in error


@pytest.mark.parametrize("command", QUICK, ids=" ".join)
def test_a_closed_stdout_is_refused_and_a_closed_stderr_is_not(command):
    code, error = shell([*BLT, *command], ">&-")
    assert (code, error) == (2, "stdout is closed: there is nowhere to write results\n")
    assert shell([*BLT, *command], "2>&- > /dev/null")[0] == 0


def test_a_long_listing_does_as_much(error):
    command = ("plugins", "--json")
    with reading() as (read, write):
        read.close()
        assert fork(command, write, error) == (0, "")
    with Path("/dev/full").open("wb") as full:
        code, text = fork(command, full, error)
    assert (code, text.count("\n")) == (1, 1), text
    assert "No space left on device" in text


def test_a_long_listing_needs_a_stdout_and_no_stderr(error, tmp_path):
    command = ("plugins", "--json")
    refused = "stdout is closed: there is nowhere to write results\n"
    assert fork(command, None, error) == (2, refused)
    with Path(os.devnull).open() as nothing, (tmp_path / "out").open("wb") as out:
        assert forks().start(MAIN, command, streams=(nothing, out, None)).wait() == 0
    assert json.loads((tmp_path / "out").read_text())["broken"] == []


def test_a_report_that_nobody_can_read_ends_no_run(generate, tmp_path):
    with (tmp_path / "out").open("wb") as out, Path("/dev/full").open("wb") as full:
        assert forks().start(MAIN, generate, streams=(full, out, full)).wait() == 0
    assert (tmp_path / "out").stat().st_size == 200


NOISY = """
import logging, os, subprocess, sys
import structlog, typer
from blt_core import Component, hookimpl
from blt_core.cli import output
from blt_plugins.drafting.self import SelfDrafter, SelfParams

log = structlog.get_logger()
print("NOISE import")
log.warning("NOISE structlog")
os.write(1, b"NOISE descriptor\\n")
logging.basicConfig(stream=sys.stdout)
logging.warning("NOISE logging")

class Noisy(SelfDrafter):
    def __init__(self, params, context):
        super().__init__(params, context)
        print("NOISE factory")

    def draft(self, ops, limit, sampling, draws):
        print("NOISE forward")
        sys.stdout.write("NOISE write\\n")
        sys.stdout.buffer.write(b"NOISE bytes\\n")
        subprocess.run(["echo", "NOISE process"])
        return super().draft(ops, limit, sampling, draws)

@hookimpl
def blt_components():
    print("NOISE hook")
    return [Component("drafter", "acme/noisy", Noisy, SelfParams, "noise")]

@hookimpl
def blt_run_start(run):
    print("NOISE run")
    raise ValueError("NOISE broken hook")

def command():
    print("NOISE command")
    output("one")
    typer.echo("two")
    typer.echo(b"three")
    output(b"four")
"""


@pytest.fixture
def noisy(tmp_path):
    """Run a command line beside an installed plugin that writes to stdout wherever it can."""
    (tmp_path / "blt_noisy.py").write_text(NOISY.replace("\\\\", "\\"))
    info = tmp_path / "blt_noisy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: blt-noisy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[blt_core]\nnoisy = blt_noisy\n[blt_core.commands]\nnoisy = blt_noisy:command\n"
    )

    def call(*arguments):
        return forks().run(MAIN, arguments, paths=[tmp_path])

    return call


NOISES = ("import", "structlog", "descriptor", "logging", "factory", "forward", "write", "bytes",
          "process", "hook", "run", "broken hook")  # fmt: skip


def test_what_a_plugin_prints_is_no_result(noisy, run_config, blt):
    command = ("generate", run_config(), "--prompt", "ab", "--max-new-bytes", 20)
    expected = blt(*command, "--sampler", "blt-s draft_bytes=4").out
    sampler = ("--sampler", "speculative drafter.use=acme/noisy drafter.draft_bytes=4")
    done = noisy(*command, *sampler)
    assert (done.returncode, done.stdout) == (0, expected)
    for noise in NOISES:
        assert f"NOISE {noise}" in done.stderr.decode(), noise
    record = json.loads(noisy(*command, *sampler, "--json").stdout)
    assert record["drafted"] > 0
    assert json.loads(noisy("plugins", "--json").stdout)["broken"] == []


def test_a_command_of_a_plugin_writes_results_by_output_or_echo(noisy):
    done = noisy("noisy")
    assert (done.returncode, done.stdout) == (0, b"one\ntwo\nthree\nfour")
    assert b"NOISE command" in done.stderr


def test_a_program_keeps_its_stdout(checkpoint):
    program = f"""
import structlog, sys
from blt_core import Pipeline
before = sys.stdout
Pipeline.from_config({{"schema": 1, "run": {{"checkpoint": {str(checkpoint)!r}}}}}).generate("x")
assert sys.stdout is before and not structlog.is_configured()
print("mine")
"""
    done = forks().run(program)
    assert (done.returncode, done.stdout) == (0, b"mine\n"), done.stderr


def test_a_closed_stdin_is_refused_where_it_is_read(generate, error, tmp_path):
    with (tmp_path / "out").open("wb") as out:
        command = ["generate", generate[1], "--prompt-file", "-"]
        assert forks().start(MAIN, command, streams=(None, out, error)).wait() == 2
    assert "stdin is closed" in said(error)


def test_ctrl_c_says_so_and_exits_with_1(generate, error):
    # More than can be written before somebody reads: it cannot be done before the signal comes.
    command = [*generate[:-1], "250", *["--prompt", "y"] * 400]
    with reading() as (read, write), Path(os.devnull).open() as nothing:
        process = forks().start(MAIN, command, streams=(nothing, write, error))
        write.close()
        read.read(1)  # it generates
        os.kill(process.pid, signal.SIGINT)
        read.read()
        assert process.wait() == 1
    assert said(error).strip().splitlines()[-1] == "interrupted"


def test_a_narrow_terminal_encoding_costs_characters_not_the_command():
    done = subprocess.run(
        [*BLT, "cost"],
        check=False,
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
        timeout=300,
    )
    assert done.returncode == 0
    assert b"BLT-D-4" in done.stdout
