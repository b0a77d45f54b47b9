"""Throughput of executors on this machine: ``local`` and ``ray`` with the same number of workers.

    python benchmarks/executors.py [--workers 2] [--turns 6] [--seconds 50] [--json]

Each generates from prompts that differ, in batches of 8. Both are started, and their workers have
loaded the model and done two batches, before anything is timed; then they take turns of so many
seconds, while the other's workers are idle. A turn ends when its last batch does. The ratio is that
of two turns beside each other, so that a drift of the machine meets both.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import platform
import statistics
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from blt_core import Pipeline
from blt_core.component import BuildContext
from blt_core.execution import Executor, Tell, Workers
from blt_core.plugins.loading import load_plugins
from blt_core.wiring.resolve import build_node, resolve_component

PROMPTS = Path(__file__).parent / "prompts"
NAMES = ("local", "ray")
ROWS, NEW = 8, 100
#: Batches of each worker that are not counted.
WARM_UP = 2
#: Bytes a second by turn, of each executor.
Speeds = dict[str, list[float]]


def texts() -> Iterator[list[bytes]]:
    """Batches of prompts without end: the held-out ones, cut at places that differ."""
    whole = [path.read_bytes() for path in sorted(PROMPTS.glob("*.txt"))]
    for number in itertools.count():
        yield [whole[(number + row) % len(whole)][: 40 + 13 * (number % 17)] for row in range(ROWS)]


def make(_tell: Tell) -> partial[int]:
    """The work of a worker: bytes generated of a batch."""
    # Workers that load while others work would measure kernels on a busy machine.
    run = {"checkpoint": "demo:python", "max_new_bytes": NEW, "kernels": "fixed"}
    pipeline = Pipeline.from_config({"schema": 1, "run": run, "sampler": {"use": "blt-s"}})
    return partial(generate, pipeline)


def generate(pipeline: Pipeline, prompts: list[bytes]) -> int:
    """Generate; how many bytes there were."""
    return sum(len(each.output) for each in pipeline.generate(prompts))


def until(deadline: float, batches: Iterator[list[bytes]]) -> Iterator[list[bytes]]:
    """Batches for as long as there is time."""
    while time.perf_counter() < deadline:
        yield next(batches)


def turn(running: Workers, seconds: float, batches: Iterator[list[bytes]]) -> float:
    """Bytes a second of all workers."""
    began = time.perf_counter()
    size = sum(new for _, new in running.run(until(began + seconds, batches)))
    return size / (time.perf_counter() - began)


def measure(executors: Mapping[str, Executor], options: argparse.Namespace) -> Speeds:
    """Bytes a second of each, turn by turn; the one that begins changes."""
    speeds: Speeds = {name: [] for name in executors}
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(e.start(make)) for name, e in executors.items()}
        batches = {name: texts() for name in executors}
        for name, workers in running.items():
            warming = itertools.islice(batches[name], WARM_UP * options.workers)
            list(workers.run(warming))
        for number in range(options.turns):
            for name in [*running][:: -1 if number % 2 else 1]:
                speeds[name].append(turn(running[name], options.seconds, batches[name]))
    return speeds


def show(speeds: Speeds, workers: int) -> None:
    """Medians, least and most; and of the ratios of turns."""
    print(f"{platform.processor() or platform.machine()}, {workers} workers, bytes/s")
    ratios = [b / a for a, b in zip(*(speeds[name] for name in NAMES), strict=True)]
    for name, found in {**speeds, "ray / local": ratios}.items():
        form = ".3f" if found is ratios else ".1f"
        low, middle, high = min(found), statistics.median(found), max(found)
        print(f"  {name:12} {middle:8{form}}   {low:{form}} to {high:{form}}, {len(found)} turns")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=6, help="of each executor")
    parser.add_argument("--seconds", type=float, default=50, help="of a turn")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    plugins = load_plugins()
    executors = {}
    for name in NAMES:
        node = resolve_component("executor", {"use": name, "workers": options.workers}, plugins)
        executors[name] = build_node(node, BuildContext(), plugins.registry)
    speeds = measure(executors, options)
    if options.json:
        print(json.dumps(speeds))
    else:
        show(speeds, options.workers)


if __name__ == "__main__":
    main()
