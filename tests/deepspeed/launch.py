"""Starts programs as a launcher would, each with a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.training.forks import Forks

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("program.py")
SECONDS = 600


def environment(extensions: Path) -> dict[str, str]:
    """Of a process on one thread that has no launcher; ``extensions`` is what must stay empty."""
    mine = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    path = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), mine.get("PYTHONPATH", "")])
    return mine | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "CUDA_VISIBLE_DEVICES": "",
    }


def run(command: Sequence[str], env: Mapping[str, str]) -> str:
    """Run a program to its end; what it wrote. Its processes end with it, or when time is up."""
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=SECONDS)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def run_program(forks: Forks, case: str, result: Path, folder: Path, world: int) -> None:
    """Run a case of program.py in ``world`` processes; one is run as without a launcher."""
    done = forks.run(world, [str(PROGRAM), str(result), case, str(folder)], {}, seconds=SECONDS)
    assert result.exists(), done.stderr
