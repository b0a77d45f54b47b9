"""Throughput of executors on this machine: ``local`` and ``ray`` with the same number of workers.

    python benchmarks/executors.py [--workers 2] [--seconds 300] [--json]

Each generates for so many seconds from prompts that differ, in batches of 8; the start (processes,
the loading of models, the first batch of each worker) is left out. The runs take turns by halves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from blt_core import Pipeline
from blt_core.component import BuildContext
from blt_core.execution import Executor, Tell
from blt_core.plugins.loading import load_plugins
from blt_core.wiring.resolve import build_node, resolve_component

PROMPTS = Path(__file__).parent / "prompts"
NAMES = ("local", "ray")
ROWS, NEW = 8, 100
#: Batches of each worker that are not counted.
WARM_UP = 2


def texts() -> Iterator[list[bytes]]:
    """Batches of prompts without end: the held-out ones, cut at places that differ."""
    whole = [path.read_bytes() for path in sorted(PROMPTS.glob("*.txt"))]
    for number in itertools.count():
        yield [whole[(number + row) % len(whole)][: 40 + 13 * (number % 17)] for row in range(ROWS)]


def make(_tell: Tell) -> partial[int]:
    """The work of a worker: bytes generated of a batch."""
    run = {"checkpoint": "demo:python", "max_new_bytes": NEW}
    pipeline = Pipeline.from_config({"schema": 1, "run": run, "sampler": {"use": "blt-s"}})
    return partial(generate, pipeline)


def generate(pipeline: Pipeline, prompts: list[bytes]) -> int:
    """Generate; how many bytes there were."""
    return sum(len(each.output) for each in pipeline.generate(prompts))


def measure(executor: Executor, workers: int, seconds: float) -> float:
    """Bytes a second of all workers."""
    began, size = 0.0, 0
    with executor.start(make) as running:
        for count, (_number, new) in enumerate(running.run(texts()), 1):
            now = time.perf_counter()
            if count == WARM_UP * workers:
                began = now
            elif began:
                size += new
                if now - began >= seconds:
                    break
    return size / (now - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=300, help="of each executor")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    plugins = load_plugins()
    speeds: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(2):
        for name in NAMES:
            table = {"use": name, "workers": options.workers}
            node = resolve_component("executor", table, plugins)
            executor = build_node(node, BuildContext(), plugins.registry)
            speeds[name].append(measure(executor, options.workers, options.seconds / 2))
    if options.json:
        print(json.dumps(speeds))
        return
    print(f"{platform.processor() or platform.machine()}, {options.workers} workers, bytes/s")
    for name, found in speeds.items():
        shown = " ".join(f"{each:8.1f}" for each in found)
        print(f"  {name:6} {shown}   {sum(found) / sum(speeds['local']):.3f} of local")


if __name__ == "__main__":
    main()
