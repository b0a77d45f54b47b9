"""Real processes: closed and full streams, readers that go away, Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

BLT = [sys.executable, "-c", "from blt_core.cli import main; main()"]


@pytest.fixture
def generate(run_config):
    return [*BLT, "generate", str(run_config()), "--prompt", "x", "--max-new-bytes", "200"]


def shell(command, redirection):
    """Run a command with a shell's redirection: (code, stderr)."""
    line = " ".join(["exec", *("'" + part.replace("'", "'\\''") + "'" for part in command)])
    done = subprocess.run(
        ["sh", "-c", f"{line} {redirection}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


def test_a_reader_that_has_enough_ends_the_run_quietly(generate):
    with subprocess.Popen(generate, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == b""


def test_a_full_disk_is_one_message_and_exit_code_1(generate):
    code, error = shell(generate, "> /dev/full")
    assert code == 1
    assert "Traceback" not in error
    assert "cannot read or write" in error


def test_closed_streams(generate):
    assert shell(generate, ">&-")[0] == 0
    code, error = shell([*BLT, "generate", generate[4], "--prompt-file", "-"], "<&-")
    assert code == 2
    assert "stdin is closed" in error


def test_ctrl_c_says_so_and_exits_with_1(generate):
    command = [*generate[:-1], "250"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)  # it generates
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, error = process.communicate(timeout=60)
    if process.returncode == 0 and time.monotonic() - began < 1:
        return  # it was done before the signal came
    assert process.returncode == 1
    assert error.decode().strip() == "interrupted"


def test_a_narrow_terminal_encoding_costs_characters_not_the_command():
    done = subprocess.run(
        [*BLT, "cost"],
        check=False,
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
        timeout=60,
    )
    assert done.returncode == 0
    assert b"BLT-D-4" in done.stdout
