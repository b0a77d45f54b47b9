"""Processes that begin with what they import: forks of one that has imported it once.

Importing torch takes nearly all of the time of a short command. A fork gets the file descriptors
that it is given, has streams as a new interpreter makes them, and ends as one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

#: What a command line imports before it does anything with a model.
BLT_IMPORTS = "import torch; torch.set_num_threads(1); import blt_core.cli, blt_core.pipeline"
BLT = "from blt_core.cli import main; main()"

#: Forks for each message; a fork leaves the loop, and is what the message says.
SERVER = """
import importlib, json, os, signal, socket, sys
exec(sys.argv[1])

def wait_for_job(calls):
    while True:
        message, given, *_ = socket.recv_fds(calls, 1 << 18, 3)
        if not message:
            os._exit(0)
        child = os.fork()
        if child == 0:
            return json.loads(message), given
        for each in given:
            os.close(each)
        calls.send(str(child).encode())
        calls.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())

def become(calls):
    job, given = wait_for_job(calls)
    calls.close()
    for number, at in enumerate(job["streams"]):
        os.close(number) if at is None else os.dup2(given[at], number)
    for each in given:
        os.close(each)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        found = None
        if job["streams"][number] is not None:
            found = open(
                number, "w" if number else "r", -1 if number < 2 else 1, closefd=False,
                errors="strict" if number < 2 else "backslashreplace",
            )
        setattr(sys, name, found)
        setattr(sys, f"__{name}__", found)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = job["argv"]
    sys.path[1:1] = job["paths"]
    importlib.invalidate_caches()
    return compile(job["code"], "<string>", "exec")

exec(become(socket.socket(fileno=int(sys.argv[2]))), {"__name__": "__main__"})
"""


class Fork:
    """A process that runs, as subprocess.Popen has one; ``wait`` has to be called."""

    def __init__(self, calls: socket.socket, pid: int) -> None:
        self._calls, self.pid = calls, pid

    def wait(self, timeout: float = 300) -> int:
        """What it ended with; killed first, and TimeoutExpired, if it does not end."""
        ready, _, _ = select.select([self._calls], [], [], timeout)
        if not ready:
            os.kill(self.pid, signal.SIGKILL)
        code = int(self._calls.recv(64))
        if not ready:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return code


class Forks:
    """Runs programs in forks of a Python that has run ``imports``, one at a time."""

    def __init__(
        self,
        imports: str = BLT_IMPORTS,
        python: str | Path = sys.executable,
        env: Mapping[str, str] = os.environ,
        cwd: str | Path = "/",
    ) -> None:
        self._calls, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [str(python), "-c", SERVER, imports, str(theirs.fileno())],
                cwd=cwd, env={**env, "OMP_NUM_THREADS": "1"}, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def start(
        self,
        code: str,
        arguments: Iterable[object] = (),
        *,
        streams: tuple[IO | int | None, IO | int | None, IO | int | None],
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        paths: Iterable[str | Path] = (),
        name: str = "-c",
    ) -> Fork:
        """Start a program. streams: what 0, 1 and 2 are; None: closed. paths: as PYTHONPATH's.

        name: what argv begins with.
        """
        given = [each for each in streams if each is not None]
        job = {
            "streams": [None if each is None else given.index(each) for each in streams],
            "code": code, "argv": [name, *map(str, arguments)], "paths": [*map(str, paths)],
            "cwd": str(cwd or Path.cwd()), "env": dict(os.environ if env is None else env),
        }  # fmt: skip
        numbers = [each if isinstance(each, int) else each.fileno() for each in given]
        socket.send_fds(self._calls, [json.dumps(job).encode()], numbers)
        return Fork(self._calls, int(self._calls.recv(64)))

    def run(
        self, code: str, arguments: Iterable[object] = (), *, stdin: IO | None = None, **how
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program to its end, and take what it writes."""
        with contextlib.ExitStack() as files:
            out, err = (files.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            given = stdin or files.enter_context(Path(os.devnull).open("rb"))
            ended = self.start(code, arguments, streams=(given, out, err), **how).wait()
            for each in (out, err):
                each.seek(0)
            return subprocess.CompletedProcess(code, ended, out.read(), err.read())

    def close(self) -> None:
        """End the process that is forked."""
        self._calls.close()
        self._server.wait()


@functools.cache
def forks(imports: str = BLT_IMPORTS) -> Forks:
    """Forks of this Python, for all tests of this process."""
    made = Forks(imports)
    atexit.register(made.close)
    return made


@contextlib.contextmanager
def reading() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The two ends of a pipe: (what is read, what is written)."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", 0) as read, os.fdopen(writer, "wb", 0) as write:
        yield read, write
