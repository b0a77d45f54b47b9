"""What the choice of kernels gives: ``ar`` by the fixed rule, by measured kernels, with the native.

And with compiled passes, and with a byte scorer in bfloat16, and with both.

Each measurement is a process of its own, and they take turns. bytes/s: greedy, after the first
byte. GB/s: all weights that the passes multiply by, the byte scorer's included, beside what a plain
sum over memory reads in the same process, right before and after.

    python benchmarks/kernels.py [--threads 1]                          demo:python, float32
    python benchmarks/kernels.py --folder DIR --dtype bfloat16 --threads 2
        a model of transformers' format, as benchmarks/transformers_speed.py --shape 1b writes one

The native kernel is compiled into a temporary folder; without a compiler it is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from blt_core.errors import RunError
from blt_core.kernels import native
from blt_core.kernels.machine import machine, read_bandwidth
from blt_core.pipeline import Pipeline

PROMPT = Path(__file__).parent / "prompts" / "python-1.txt"
#: Calls that a process measures, each between two plain reads, for a machine's speed may drift.
CALLS = 3
FIGURES = ("bytes_per_second", "gigabytes_per_second", "read_bandwidth", "share")
#: [run] tables, and whether the native kernel is there.
MODES: dict[str, tuple[dict[str, str | bool], bool]] = {
    "fixed": ({"kernels": "fixed"}, False),
    "measured": ({"kernels": "measured"}, False),
    "with native": ({"kernels": "measured"}, True),
    "scorer bfloat16": ({"kernels": "measured", "scorer_dtype": "bfloat16"}, True),
    "compiled": ({"kernels": "measured", "compile": True}, True),
    "both": ({"kernels": "measured", "scorer_dtype": "bfloat16", "compile": True}, True),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", default="demo:python", help="a checkpoint")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sampler", default="ar")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new", type=int, default=200, help="bytes generated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--caches", type=Path, help="where kernels and choices are kept")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the [run] table of a process of its own
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only:
        print(json.dumps(measure(json.loads(options.only), options)))
        return
    with tempfile.TemporaryDirectory() as work:
        found = compare(options.caches or Path(work), options)
    print(json.dumps(found) if options.json else table(found, options))


def compare(work: Path, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The figures of each repeat, by mode."""
    caches = {False: work / "torch", True: work / "native"}
    os.environ["XDG_CACHE_HOME"] = str(caches[True])
    modes = options.modes
    try:
        native.build()
    except RunError as error:
        print(error, file=sys.stderr)
        modes = [mode for mode in modes if not MODES[mode][1]]
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
    for _ in range(options.repeats):
        for mode in modes:
            found[mode].append(alone(mode, caches, options))
            print(f"{mode}: {found[mode][-1]}", file=sys.stderr)
    return found


def alone(mode: str, caches: dict[bool, Path], options: argparse.Namespace) -> dict[str, float]:
    """What one process measures; the first with a cache chooses its kernels when it loads."""
    run, compiled = MODES[mode]
    given = (f"--{name}={getattr(options, name)}" for name in ("folder", "dtype", "sampler"))
    numbers = (f"--{name}={getattr(options, name)}" for name in ("threads", "new"))
    command = [sys.executable, __file__, *given, *numbers, "--only", json.dumps(run)]
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(caches[compiled]),
        "OMP_NUM_THREADS": str(options.threads),
    }
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure(run: dict[str, str | bool], options: argparse.Namespace) -> dict[str, float]:
    """Speed, and GB/s of weights, of calls after one that is like them: medians of each."""
    table = {"checkpoint": options.folder, "dtype": options.dtype, **run}
    pipeline = Pipeline.from_config({"schema": 1, "run": table}).with_sampler(options.sampler)
    text = PROMPT.read_bytes()[:64]
    counted = weights_read(pipeline, text, options.new)
    pipeline.generate(text, max_new_bytes=options.new)  # what is compiled is compiled now
    calls, before = [], read_bandwidth()
    for _ in range(CALLS):
        result = pipeline.generate(text, max_new_bytes=options.new)
        after = read_bandwidth()
        used, there = counted / result.seconds / 1e9, (before + after) / 2
        calls.append((result.bytes_per_second, used, there, used / there))
        before = after
    return dict(zip(FIGURES, map(statistics.median, zip(*calls, strict=True)), strict=True))


def weights_read(pipeline: Pipeline, text: bytes, count: int) -> int:
    """Bytes of weights that passes after the first round multiply by."""
    counted = [0]

    def add(module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        counted[0] += module.weight.nbytes

    modules = pipeline.model.module_dict().modules()
    hooks = [m.register_forward_hook(add) for m in modules if isinstance(m, torch.nn.Linear)]
    for index, _ in enumerate(pipeline.steps([text], max_new_bytes=count)):
        if index == 0:
            counted[0] = 0
    for hook in hooks:
        hook.remove()
    return counted[0]


def table(found: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> str:
    """Medians, spreads, and shares of the plain read."""
    here = machine()
    what = f"{options.folder}, {options.dtype}, {options.sampler}"
    times = f"median (min to max) of {options.repeats}"
    lines = [f"{here.cpu}, torch {here.torch}, {options.threads} threads; {what}; {times}"]
    base = statistics.median(each["bytes_per_second"] for each in found[next(iter(found))])
    for mode, runs in found.items():
        speeds = [each["bytes_per_second"] for each in runs]
        used = statistics.median(each["gigabytes_per_second"] for each in runs)
        read = statistics.median(each["read_bandwidth"] for each in runs)
        share = statistics.median(each["share"] for each in runs)
        median, least, most = statistics.median(speeds), min(speeds), max(speeds)
        lines.append(
            f"  {mode:<16} {median:6.1f} ({least:.1f} to {most:.1f}) bytes/s  {median / base:.2f} x"
            f"   {used:.1f} GB/s of {read:.1f}: {share:.0%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
