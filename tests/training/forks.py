"""Processes that begin with what training imports: forks of one that has imported it once.

Importing takes nearly all of the time of a tiny run, and a launcher imports as much again.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: Forks for each line of stdin: a program as the main module of ``processes`` that know each other.
#: Writes what they ended with; what imports print goes to stderr. A fork leaves this loop for good.
SERVER = """
import importlib, json, os, signal, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import torch
import matplotlib.figure, torch._dynamo, torch.distributed.fsdp  # what runs import late
import blt_plugins.training.run.make_job, blt_plugins.training.run.trainer
for name in sys.argv[1:]:
    importlib.import_module(name)
torch.set_num_threads(1)

def become(job, rank):
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{job['said']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.environ.update(job["env"])
    if job["processes"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    signal.alarm(job["seconds"])  # ends a process that hangs
    sys.argv = job["argv"]
    code = 1
    try:
        exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    job, children = json.loads(line), []
    for rank in range(job["processes"]):
        children.append(os.fork())
        if children[-1] == 0:
            become(job, rank)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(ends), file=answers, flush=True)
"""


#: Within this a program has ended, or is ended.
SECONDS = 600


class Ended(subprocess.CompletedProcess[str]):
    """What all processes of a program wrote; ``returncode`` of one that failed, or 0."""

    #: What each has ended with.
    codes: list[int]


class Forks:
    """Runs programs as a launcher would, in forks of a process that ends with ``close``.

    modules: what is imported before, beside what training imports. env: of that process.
    """

    def __init__(self, folder: Path, *modules: str, env: Mapping[str, str] | None = None) -> None:
        self._folder, self._count = folder, 0
        paths = [str(ROOT), *filter(None, sys.path)]
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(paths),
                **(env or {}),
            },
        )

    def run(
        self, processes: int, argv: Sequence[str], env: Mapping[str, str], seconds: int = SECONDS
    ) -> Ended:
        """Run a program in as many processes, each of which has ``seconds`` for it."""
        self._count += 1
        said = self._folder / f"said-{self._count}"
        known: dict[str, str] = dict(env)
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                known["MASTER_PORT"] = str(free.getsockname()[1])
            known |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(processes)}
        job: dict[str, Any] = {"processes": processes, "argv": list(argv), "env": known}
        job |= {"said": str(said), "seconds": seconds}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        ends = json.loads(self._server.stdout.readline())
        out, err = (said.with_suffix(name).read_text() for name in (".out", ".err"))
        ended = Ended(argv, max(ends, key=abs), out, err)
        ended.codes = ends
        return ended

    def close(self) -> None:
        """End the process that is forked."""
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()
