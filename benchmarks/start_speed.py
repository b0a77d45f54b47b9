"""How long the command line takes to answer what needs no model.

Programs take turns, so that what else the machine does meets all alike; the median of each is
given in seconds and as a ratio to an empty Python program.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

BLT = [sys.executable, "-c", "from blt_core.cli import main; main()"]
COMPLETION = {"_BLT_COMPLETE": "complete_bash", "COMP_WORDS": "blt gen", "COMP_CWORD": "1"}
PROGRAMS: dict[str, tuple[list[str], dict[str, str]]] = {
    "python -c pass": ([sys.executable, "-c", "pass"], {}),
    "python -c 'import torch'": ([sys.executable, "-c", "import torch"], {}),
    "blt --version": ([*BLT, "--version"], {}),
    "blt --help": ([*BLT, "--help"], {}),
    "blt generate --help": ([*BLT, "generate", "--help"], {}),
    "blt gen<TAB>": (BLT, COMPLETION),
}


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """How long a program runs, from its start to its end."""
    began = time.perf_counter()
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Time all programs in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for turn in range(repeats + 1):
        for name, (command, environment) in PROGRAMS.items():
            taken = seconds(command, environment)
            if turn:  # the first reads files that are not in the cache yet
                times[name].append(taken)
    empty = statistics.median(times["python -c pass"])
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(
            f"{name:26} {middle:6.2f} s  ({min(taken):.2f} to {max(taken):.2f})"
            f"  {middle / empty:6.1f} x"
        )


if __name__ == "__main__":
    main()
