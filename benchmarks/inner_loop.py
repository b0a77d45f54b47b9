"""The engine's inner loop: bytes/s of samplers beside another commit, and what ragged batches cost.

Each commit is installed into a temporary folder, with its own plugins and weights; each measurement
is a process of its own, and those of the two take turns. Ratios of medians are what counts. The
rounds of ragged batches are those of this checkout alone. "here" has measured kernels, the native
one among them, where a compiler is there; "fixed" has ``kernels = "fixed"``, and "compiled" is
"here" with ``[run] compile``: its first process is told apart from later ones by what they wait
for.

    python benchmarks/inner_loop.py [--commit 37a7142] [--repeats 5] [--samplers ar] [--json]
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

ROOT = Path(__file__).resolve().parent.parent
SAMPLERS = {
    "ar": {"use": "ar"},
    "blt-s": {"use": "blt-s", "draft_bytes": 8},
    "cascade": {"use": "speculative", "drafter": {"use": "cascade", "draft_bytes": 16}},
}

#: ``[run]`` of this checkout.
MODES: dict[str, dict[str, object]] = {
    "fixed": {"kernels": "fixed"},
    "here": {"kernels": "measured"},
    "compiled": {"kernels": "measured", "compile": True},
}

#: Run in a process with a commit's own code: bytes/s of greedy texts after their first bytes, what
#: two first texts took, and the mean seconds of a first byte.
MEASURE = """
import json, sys, time
from pathlib import Path
from blt_core import Pipeline

sampler, new, folder = json.loads(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
run = {"checkpoint": "demo:python", **json.loads(sys.argv[4])}
pipeline = Pipeline.from_config({"schema": 1, "run": run, "sampler": sampler})
prompts = [path.read_bytes() for path in sorted(folder.glob("*.txt"))]
began = time.perf_counter()
for prompt in prompts[:2]:
    pipeline.generate(prompt, max_new_bytes=new)
waited, seconds, count, first = time.perf_counter() - began, 0, 0, 0
for prompt in prompts:
    found = pipeline.generate(prompt, max_new_bytes=new)
    count += len(found.output)
    seconds += len(found.output) / found.bytes_per_second
    first += found.prefill_seconds
print(json.dumps([count / seconds, waited, first / len(prompts)]))
"""

#: Compiles the native kernel, if there is a compiler.
BUILD = """
import sys
from blt_core.errors import RunError
from blt_core.kernels import native

try:
    native.build()
except RunError as error:
    print(error, file=sys.stderr)
print([])
"""

#: The mean seconds of a round of ``ar`` over batches of prompts of given lengths, which take turns
#: round by round. No two prompts are alike, for rows that end their patches together pay for fewer
#: passes of the large parts.
ROUND = """
import json, sys, time
from blt_core import Pipeline

batches, new = json.loads(sys.argv[1]), int(sys.argv[2])
pipeline = Pipeline.from_config({"schema": 1, "run": {"checkpoint": "demo:python"}})
text = b"".join(b"value_%d = call(%d)\\n" % (i, i * i) for i in range(1000))

def prompts(lengths):
    return [text[300 * row : 300 * row + length] for row, length in enumerate(lengths)]

runs = [pipeline.with_sampler("ar").steps(prompts(each), max_new_bytes=new) for each in batches]
for steps in runs:
    for _ in range(3):
        next(steps)
seconds = [0.0] * len(runs)
for _ in range(new - 3):
    for index, steps in enumerate(runs):
        began = time.perf_counter()
        step = next(steps, None)
        seconds[index] += time.perf_counter() - began
        if step is None or not all(step.new):
            sys.exit("a text ended: its rounds are no measure of those of the others")
print(json.dumps([each / (new - 3) for each in seconds]))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", default="37a7142", help="what to compare with")
    parser.add_argument("--new", type=int, default=200, help="bytes generated of each prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        site = install(options.commit, Path(folder))
        speeds, starts, firsts = compare(site, options, Path(folder) / "compiled")
        rounds = ragged(options)
    if options.json:
        told = {"bytes_per_second": speeds, "first_byte_seconds": firsts}
        told |= {"compiled_start_seconds": starts, "round_seconds": rounds}
        print(json.dumps(told))
    else:
        report(speeds, starts, firsts, rounds, options.commit)


def install(commit: str, folder: Path) -> Path:
    """A folder with the packages of a commit."""
    tree, site = folder / "tree", folder / "site"
    run("git", "clone", "--quiet", str(ROOT), str(tree))
    run("git", "-C", str(tree), "checkout", "--quiet", commit)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--target", str(site), str(tree))
    return site


def compare(
    site: Path, options: argparse.Namespace, kept: Path
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[float]], dict[str, list[float]]]:
    """The bytes/s of each repeat; two first texts' seconds; seconds to a first byte.

    Of each sampler and mode, the other commit's, in a folder, among them; of each sampler with
    compiled passes, which are kept in a folder; of each mode, with the first sampler.
    """
    cases: dict[str, tuple[Path | None, dict[str, object]]] = {
        options.commit: (site, {}),
        **{name: (None, settings) for name, settings in MODES.items()},
    }
    speeds = {s: {name: list[float]() for name in cases} for s in options.samplers}
    starts = {s: list[float]() for s in options.samplers}
    firsts = {name: list[float]() for name in cases}
    prompts = str(ROOT / "benchmarks/prompts")
    for sampler in options.samplers:
        measure(BUILD, None, kept=kept / sampler)
    for _ in range(options.repeats):
        for sampler in options.samplers:
            for name, (tree, settings) in cases.items():
                table = json.dumps(SAMPLERS[sampler])
                arguments = (table, str(options.new), prompts, json.dumps(settings))
                speed, waited, first = measure(MEASURE, tree, *arguments, kept=kept / sampler)
                speeds[sampler][name].append(speed)
                if sampler == options.samplers[0]:
                    firsts[name].append(first)
                if name == "compiled":
                    starts[sampler].append(waited)
    return speeds, starts, firsts


def ragged(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a round of two long texts, and of a long and a short one."""
    cases = ((3900, 3900), (10, 3900))
    turns = [measure(ROUND, None, json.dumps(cases), "80") for _ in range(options.repeats)]
    return {
        ",".join(map(str, case)): list(each)
        for case, each in zip(cases, zip(*turns, strict=True), strict=True)
    }


def measure(
    program: str, site: Path | None, *arguments: str, kept: Path | None = None
) -> list[Any]:
    """What a process prints that runs ``program`` with the packages in ``site`` (None: these)."""
    folders = [ROOT, ROOT / "plugins"] if site is None else [site]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    if kept is not None:
        environment["XDG_CACHE_HOME"] = str(kept)
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(
            command, env=environment, cwd=elsewhere, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(f"{done.stderr}a process ended with {done.returncode}")
    figures: list[Any] = json.loads(done.stdout)
    return figures


def run(*command: str) -> None:
    """A command that must succeed."""
    subprocess.run(command, check=True)


def report(
    speeds: dict[str, dict[str, list[float]]],
    starts: dict[str, list[float]],
    firsts: dict[str, list[float]],
    rounds: dict[str, list[float]],
    commit: str,
) -> None:
    """Print medians, spreads and ratios."""
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"bytes/s, median (min to max); OMP_NUM_THREADS: {threads}")
    for sampler, found in speeds.items():
        print(f"  {sampler}")
        for name, each in found.items():
            ratio = statistics.median(each) / statistics.median(found[commit])
            print(f"    {name:<10} {told(each)}   {ratio:.2f} x")
    print("milliseconds to the first byte, of the first sampler")
    for name, each in firsts.items():
        print(f"  {name:<12} {told([1e3 * first for first in each])}")
    print("seconds of two first texts with compiled passes: the first process, later ones")
    for sampler, waited in starts.items():
        print(f"  {sampler:<14} {waited[0]:6.1f}  {', '.join(f'{w:.1f}' for w in waited[1:])}")
    print("milliseconds of a round of ar, prompts of")
    ratios = [mixed / both for both, mixed in zip(*rounds.values(), strict=True)]
    for case, found_rounds in rounds.items():
        print(f"  {case:<14} {told([1e3 * each for each in found_rounds])}")
    print(f"  ragged / even  {told(ratios, 2)}")


def told(values: list[float], places: int = 1) -> str:
    """Median and range."""
    middle = f"{statistics.median(values):.{places}f}"
    return f"{middle:>6} ({min(values):.{places}f} to {max(values):.{places}f})"


if __name__ == "__main__":
    main()
