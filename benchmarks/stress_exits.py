"""Repeat short runs of ``blt train`` in several processes, and count those that do not end with 0.

A finished run must exit with 0, however busy the machine is: whoever starts it, torchrun for one,
takes anything else for a failure. ``--busy`` adds processes that compute without end beside it;
``--starve`` makes the threads of process groups late, so that one which outlives the command is
often still at work when the interpreter ends; with ``--busy 0``, or they get no time at all.

    python benchmarks/stress_exits.py --runs 50 --busy 2 --strategy fsdp

Processes are forked from this one, which has imported torch; ``--torchrun`` starts them anew.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed

from blt_core.cli.app import run

#: What forked processes find imported; nothing that torch imports for several processes.
BEFORE = ("blt_core.pipeline", "blt_plugins.training.run.trainer", "matplotlib.figure", "pyarrow")

CONFIG = """
schema = 1
[corpus]
use = "folder"
path = "{texts}"
pattern = "*.txt"
valid_percent = 20
[train]
steps = 2
batch_bytes = 256
accumulate = 2
warmup_steps = 1
validate_every = 2
valid_bytes = 300
checkpoint_every = 2
[model]
context_bytes = 64
[patcher]
use = "static"
patch_bytes = 4
[encoder]
use = "local"
dim = 16
heads = 2
hidden = 32
latent_dim = 24
[global_model]
use = "transformer"
latent_dim = 24
layers = 1
heads = 2
hidden = 32
[decoder]
use = "local"
dim = 16
heads = 2
hidden = 32
layers = 1
latent_dim = 24
[training_backend]
{backend}
"""


@contextlib.contextmanager
def surroundings(count: int) -> Iterator[Path]:
    """A folder with texts, and ``count`` processes that compute without end, until the block ends.

    A forked process that leaves the block leaves both to this one.
    """
    own = os.getpid()
    folder = Path(tempfile.mkdtemp())
    spin = [sys.executable, "-c", "while True: pass"]
    spinning = [subprocess.Popen(spin) for _ in range(count)]
    try:
        for index in range(10):
            (folder / f"{index}.txt").write_text(f"text {index} says something\n" * 5)
        yield folder
    finally:
        if os.getpid() == own:
            for process in spinning:
                process.kill()
            shutil.rmtree(folder)


def starve(rank: int) -> None:
    """Give the threads of groups made from now on no time while this process computes; on Linux.

    They share a core with it, at the lowest priority. So a thread that tells of the end of a
    collective gives way before it has let the tensors go, for which it may need the interpreter.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    begin = distributed.init_process_group

    def begin_starved(*given: Any, **named: Any) -> None:
        before = set(Path("/proc/self/task").iterdir())
        begin(*given, **named)
        for thread in set(Path("/proc/self/task").iterdir()) - before:
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))

    distributed.init_process_group = begin_starved


def torchrun(folder: Path, number: int, processes: int) -> list[int]:
    """The exit code of one run as users start it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    blt = str(Path(sys.executable).with_name("blt"))
    command = [blt, "train", str(folder / "config.toml"), "--out", str(folder / f"run{number}")]
    with (folder / f"run{number}.log").open("w") as log:
        done = subprocess.run(
            [*launcher, "--nproc-per-node", str(processes), *command],
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=log,
            stderr=log,
            check=False,
        )
    return [done.returncode]


def fork(folder: Path, number: int, processes: int, *, late: bool) -> list[int]:
    """The exit code of each process of one run, which share what this program has imported."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            log = os.open(folder / f"run{number}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(processes),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            if late:
                starve(rank)
            arguments = [
                "train",
                str(folder / "config.toml"),
                "--out",
                str(folder / f"run{number}"),
            ]
            # The interpreter then ends as any does: what is under test.
            raise SystemExit(run(arguments))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def stress(strategy: str, given: argparse.Namespace) -> int:
    """Run one strategy; prints a line, and returns how many exits were none of 0."""
    backend = f'use = "torch"\nstrategy = "{strategy}"'
    if strategy == "deepspeed":
        backend = 'use = "deepspeed"\nstage = 3'
    codes: list[int] = []
    launch = torchrun if given.torchrun else partial(fork, late=given.starve)
    began = time.perf_counter()
    with surroundings(given.busy) as folder:
        (folder / "config.toml").write_text(CONFIG.format(texts=folder, backend=backend))
        for number in range(given.runs):
            found = launch(folder, number, given.processes)
            codes += found
            if any(found):
                text = (folder / f"run{number}.log").read_text()
                print(f"run {number} ended with {found}:\n{text}", file=sys.stderr)
    failed = sum(code != 0 for code in codes)
    seconds = time.perf_counter() - began
    print(f"{strategy}: {given.runs} runs, {len(codes)} exits, {failed} not 0, {seconds:.0f} s")
    return failed


def main() -> None:
    """Print a line a strategy; exit with 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50, help="runs of each strategy")
    parser.add_argument("--processes", type=int, default=2, help="processes of a run")
    parser.add_argument("--busy", type=int, default=1, help="busy processes beside them")
    parser.add_argument("--torchrun", action="store_true", help="start each run by torchrun: slow")
    parser.add_argument("--starve", action="store_true", help="late threads: see above")
    strategies = ("ddp", "fsdp", "deepspeed")
    parser.add_argument("--strategy", action="append", choices=strategies, help="repeatable")
    given = parser.parse_args()
    if given.starve and given.torchrun:
        parser.error("--starve: only processes that are forked can be starved")
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    for name in () if given.torchrun else BEFORE:
        importlib.import_module(name)
    sys.exit(1 if sum(stress(each, given) for each in given.strategy or ["ddp", "fsdp"]) else 0)


if __name__ == "__main__":
    main()
