"""Running what a model has written, in a jail: see :mod:`blt_core.evaluation.jail`."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import attrs

from blt_core.errors import DataError, RunError

_JAIL = Path(__file__).with_name("jail.py")
#: The jail's exit status where the system gives no namespaces.
_REFUSED = 3
#: What the jail itself takes to start, at most, in seconds.
_START = 10.0


@attrs.frozen(kw_only=True)
class Sandbox:
    """Bounds of a program. seconds: of wall-clock time. memory: bytes of address space a process.

    processes: how many it may have at a time. file_bytes: the longest file. isolated: whether it
    runs in namespaces of its own; without, it can reach the network and the user's files.
    """

    seconds: float = 3.0
    memory: int = 1 << 30
    processes: int = 8
    file_bytes: int = 1 << 24
    isolated: bool = True

    def passes(self, program: str) -> bool:
        """Whether a Python program runs to its end. Raises RunError if the jail does not start."""
        nonce = secrets.token_hex(16)
        request = {**attrs.asdict(self), "program": program, "nonce": nonce}
        # The interpreter itself: a virtual environment may lie where the jail does not look.
        python = getattr(sys, "_base_executable", None) or sys.executable
        with subprocess.Popen(  # noqa: S603 -- it is our own
            [python, "-I", "-S", str(_JAIL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": os.defpath, "LANG": "C.UTF-8"},
            cwd="/",
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(json.dumps(request).encode(), self.seconds)
            except subprocess.TimeoutExpired:
                return False
            finally:
                if process.poll() is None or not self.isolated:
                    _kill(process)
        if process.returncode == _REFUSED:
            raise RunError(f"the sandbox does not start: {err.decode(errors='replace')}")
        return out == nonce.encode()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the jail; the kernel kills what is in its namespaces with it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


@functools.cache
def why_not() -> str:
    """What keeps this system from isolating programs; empty if nothing does."""
    if not sys.platform.startswith("linux"):
        return f"namespaces are Linux's; this is {sys.platform}"
    try:
        works = Sandbox(seconds=_START).passes("")
    except RunError as error:
        return str(error)
    return "" if works else "a program in the sandbox did not come to its end"


def make_sandbox(*, allowed: bool, unsafe: bool, seconds: float) -> Sandbox:
    """The sandbox of a task that runs what a model has written.

    Raises DataError unless that is allowed, and can be isolated or need not be.
    """
    if not allowed:
        raise DataError(
            "this task runs programs that the model has written\n"
            "  fix: add --allow-code-execution; they run in a sandbox without network and files"
        )
    if unsafe:
        return Sandbox(seconds=seconds, isolated=False)
    if reason := why_not():
        raise DataError(
            f"--allow-code-execution: {reason}\n"
            "  fix: run where user namespaces are allowed (a container may need "
            "--security-opt seccomp=unconfined), or, in a machine that you can throw away, add "
            "--unsafe-no-sandbox"
        )
    return Sandbox(seconds=seconds)
