"""The engine's inner loop: bytes/s of samplers beside another commit, and what ragged batches cost.

Each commit is installed into a temporary folder, with its own plugins and weights; each measurement
is a process of its own, and those of the two take turns. Ratios of medians are what counts. The
rounds of ragged batches are those of this checkout alone.

    python benchmarks/inner_loop.py [--commit 37a7142] [--repeats 5] [--json]
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

ROOT = Path(__file__).resolve().parent.parent
SAMPLERS = {
    "ar": {"use": "ar"},
    "blt-s": {"use": "blt-s", "draft_bytes": 8},
    "cascade": {"use": "speculative", "drafter": {"use": "cascade", "draft_bytes": 16}},
}

#: Run in a process with a commit's own code: the seconds a byte of greedy texts, after a first one.
MEASURE = """
import json, sys
from pathlib import Path
from blt_core import Pipeline

sampler, new, folder = json.loads(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
pipeline = Pipeline.from_config(
    {"schema": 1, "run": {"checkpoint": "demo:python"}, "sampler": sampler}
)
prompts = [path.read_bytes() for path in sorted(folder.glob("*.txt"))]
pipeline.generate(prompts[0], max_new_bytes=20)
seconds = count = 0
for prompt in prompts:
    found = pipeline.generate(prompt, max_new_bytes=new)
    count += len(found.output)
    seconds += len(found.output) / found.bytes_per_second
print(json.dumps(count / seconds))
"""

#: The median seconds of a round of ``ar`` over a batch of prompts of given lengths.
ROUND = """
import json, statistics, sys, time
from blt_core import Pipeline

lengths = [int(n) for n in sys.argv[1].split(",")]
pipeline = Pipeline.from_config({"schema": 1, "run": {"checkpoint": "demo:python"}})
text = b"".join(b"value_%d = call(%d)\\n" % (i, i * i) for i in range(1000))
seconds, began = [], None
prompts = [text[:n] for n in lengths]
for step in pipeline.with_sampler("ar").steps(prompts, max_new_bytes=int(sys.argv[2])):
    now = time.perf_counter()
    if began is not None:
        seconds.append(now - began)
    began = now
print(json.dumps(statistics.median(seconds[2:])))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", default="37a7142", help="what to compare with")
    parser.add_argument("--new", type=int, default=200, help="bytes generated of each prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trees = {options.commit: install(options.commit, Path(folder)), "here": None}
        speeds = compare(trees, options)
        rounds = ragged(options)
    if options.json:
        print(json.dumps({"bytes_per_second": speeds, "round_seconds": rounds}))
    else:
        report(speeds, rounds, options.commit)


def install(commit: str, folder: Path) -> Path:
    """A folder with the packages of a commit."""
    tree, site = folder / "tree", folder / "site"
    run("git", "clone", "--quiet", str(ROOT), str(tree))
    run("git", "-C", str(tree), "checkout", "--quiet", commit)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--target", str(site), str(tree))
    return site


def compare(
    trees: dict[str, Path | None], options: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """For each sampler and commit, the bytes/s of each repeat."""
    speeds = {s: {name: list[float]() for name in trees} for s in SAMPLERS}
    for _ in range(options.repeats):
        for sampler, table in SAMPLERS.items():
            for name, site in trees.items():
                arguments = (json.dumps(table), str(options.new), str(ROOT / "benchmarks/prompts"))
                speeds[sampler][name].append(measure(MEASURE, site, *arguments))
    return speeds


def ragged(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a round of two long texts, and of a long and a short one."""
    cases = ("3800,3800", "10,3800")
    rounds = {case: list[float]() for case in cases}
    for _ in range(options.repeats):
        for case in cases:
            rounds[case].append(measure(ROUND, None, case, "60"))
    return rounds


def measure(program: str, site: Path | None, *arguments: str) -> float:
    """What a process prints that runs ``program`` with the packages in ``site`` (None: these)."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(
            command, env=environment, cwd=elsewhere, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout)


def run(*command: str) -> None:
    """A command that must succeed."""
    subprocess.run(command, check=True)


def report(
    speeds: dict[str, dict[str, list[float]]], rounds: dict[str, list[float]], commit: str
) -> None:
    """Print medians, spreads and ratios."""
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"bytes/s, median (min to max); OMP_NUM_THREADS: {threads}")
    for sampler, found in speeds.items():
        print(
            f"  {sampler:<14} {commit} {told(found[commit])}   here {told(found['here'])}", end=""
        )
        ratio = statistics.median(found["here"]) / statistics.median(found[commit])
        print(f"   {ratio:.2f} x")
    print("milliseconds of a round of ar, prompts of")
    both, mixed = (statistics.median(each) for each in rounds.values())
    for case, found_rounds in rounds.items():
        print(f"  {case:<14} {told([1e3 * each for each in found_rounds])}")
    print(f"  ragged / even  {mixed / both:.2f}")


def told(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):6.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
