"""Starts programs as a launcher would, each with a time limit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("program.py")
SECONDS = 240


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


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run(commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> str:
    """Run processes side by side; what they wrote. Ends all of them if one takes too long."""
    running = [
        subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command, env in zip(commands, environments, strict=True)
    ]
    try:
        return "\n".join(process.communicate(timeout=SECONDS)[0] for process in running)
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def run_program(case: str, result: Path, folder: Path, extensions: Path, world: int) -> None:
    """Run a case of program.py in ``world`` processes."""
    base = environment(extensions)
    shared = {"WORLD_SIZE": f"{world}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
    environments = [base | shared | {"RANK": f"{r}", "LOCAL_RANK": f"{r}"} for r in range(world)]
    command = [sys.executable, str(PROGRAM), str(result), case, str(folder)]
    output = run([command] * world, environments if world > 1 else [base])
    assert result.exists(), output
