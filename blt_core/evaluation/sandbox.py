"""Running what a model has written, in a jail: see :mod:`blt_core.evaluation.jail`."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import attrs

from blt_core.errors import DataError, RunError

_JAIL = Path(__file__).with_name("jail.py")
#: What the jail itself takes to start and to end, at most, in seconds.
_START = 30.0


@attrs.frozen(kw_only=True)
class Sandbox:
    """Bounds of a program. seconds: of wall-clock time. memory: bytes of address space a process.

    processes: how many it may have at a time, threads and three of the sandbox included.
    file_bytes: the longest file. isolated: whether it runs in namespaces of its own; without, it
    can reach the network and the user's files, and leave processes behind.
    """

    seconds: float = 3.0
    memory: int = 1 << 30
    processes: int = 16
    file_bytes: int = 1 << 24
    isolated: bool = True

    def passes(self, program: str) -> bool:
        """Whether a Python program runs to its end in time. RunError if the jail does not work."""
        nonce = secrets.token_hex(16)
        request = {**attrs.asdict(self), "program": program, "nonce": nonce}
        # The interpreter itself: a virtual environment may lie where the jail does not look.
        python = getattr(sys, "_base_executable", None) or sys.executable
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as told:
            given.write(json.dumps(request).encode())
            given.seek(0)
            with subprocess.Popen(  # noqa: S603 -- it is our own
                [python, "-I", "-S", str(_JAIL)],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=told,
                env={"PATH": os.defpath, "LANG": "C.UTF-8"},
                cwd="/",
                start_new_session=True,
            ) as process:
                try:
                    found = _read(process, len(nonce) + 1, self.seconds + _START)
                    code = process.wait(_START)
                except subprocess.TimeoutExpired:
                    raise RunError(
                        f"the sandbox did not end a program within {_START:.0f} seconds of its time"
                    ) from None
                finally:
                    _kill(process)
            told.seek(0)
            reason = told.read().decode(errors="replace")
        if code not in (0, -signal.SIGKILL):
            raise RunError(f"the sandbox does not work: {reason or f'exit status {code}'}")
        return found == nonce.encode()


def _read(process: subprocess.Popen[bytes], size: int, seconds: float) -> bytes:
    """At most ``size`` bytes that a process writes, until it ends; TimeoutExpired."""
    found, deadline = b"", time.monotonic() + seconds
    stream = process.stdout
    if stream is None:
        return found
    while len(found) < size:
        ready, _, _ = select.select([stream], [], [], 0.05)
        if ready:
            piece = os.read(stream.fileno(), size - len(found))
            if not piece:
                break
            found += piece
        elif process.poll() is not None:
            break  # what is left behind may hold the pipe
        elif time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(process.args, seconds)
    return found


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the jail, if it is there; the kernel kills what is in its namespaces with it."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


@functools.cache
def why_not(*, isolated: bool = True) -> str:
    """What keeps this system from running programs so; empty if nothing does."""
    if not sys.platform.startswith("linux"):
        return f"the sandbox is Linux's; this is {sys.platform}"
    try:
        works = Sandbox(seconds=_START, isolated=isolated).passes(_PROBE)
    except RunError as error:
        return str(error)
    return "" if works else "a program in the sandbox did not come to its end"


#: What programs import most, parts of which are compiled.
_PROBE = "import collections, decimal, heapq, itertools, math, random, re, statistics, typing"


def make_sandbox(*, allowed: bool, unsafe: bool, seconds: float) -> Sandbox:
    """The sandbox of a task that runs what a model has written.

    Raises DataError unless that is allowed, and can be isolated or need not be.
    """
    if not allowed:
        raise DataError(
            "this task runs programs that the model has written\n"
            "  fix: add --allow-code-execution; they run in a sandbox, far from network and files"
        )
    if unsafe:
        if reason := why_not(isolated=False):
            raise DataError(f"--unsafe-no-sandbox: {reason}")
        return Sandbox(seconds=seconds, isolated=False)
    if reason := why_not():
        raise DataError(
            f"--allow-code-execution: {reason}\n"
            "  fix: run where user namespaces are allowed (a container may need "
            "--security-opt seccomp=unconfined), or, in a machine that you can throw away, add "
            "--unsafe-no-sandbox"
        )
    return Sandbox(seconds=seconds)
