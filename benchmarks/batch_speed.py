"""Throughput of batches: bytes/s of 1, 8 and 32 texts that run together, of ``ar`` and of drafting.

    python benchmarks/batch_speed.py [--rows 1 8 32] [--commit REV] [--pairs FILE] [--json]

Each measurement is a process of its own, and they take turns; the time of the prompts is left out.
Texts continue the held-out prompts of ``benchmarks/prompts``, cut at several lengths, or with
``--pairs`` translate the sources of a JSON Lines file. With ``--commit`` each is measured with
another commit's code too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from inner_loop import ROOT, install, measure, told

SAMPLERS = {
    "ar": {"use": "ar"},
    "blt-s 8": {"use": "blt-s", "draft_bytes": 8},
    "blt-lookup 8": {"use": "blt-lookup", "draft_bytes": 8},
    "blt-cascade 16": {"use": "blt-cascade", "draft_bytes": 16},
    "blt-auto": {"use": "blt-auto"},
}

#: Run in a process with a commit's own code: bytes/s of a batch, after the first round.
MEASURE = """
import json, sys, time
from blt_core import Pipeline

sampler, model, prompts, new = (json.loads(text) for text in sys.argv[1:])
pipeline = Pipeline.from_config({"schema": 1, "run": {"checkpoint": model}, "sampler": sampler})
for step in pipeline.steps(prompts[:2], max_new_bytes=8):
    pass
began = count = None
for step in pipeline.steps(prompts, max_new_bytes=new):
    fresh = sum(len(each) for each in step.new)
    if began is None:
        began, count = time.perf_counter(), 0
    else:
        count += fresh
print(count / (time.perf_counter() - began))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--commit", help="measure its code too")
    parser.add_argument("--pairs", type=Path, help="translate sources of this file")
    parser.add_argument("--new", type=int, default=100, help="bytes generated of each prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = "demo:translate" if options.pairs else "demo:python"
    prompts = texts(options.pairs, max(options.rows))
    with tempfile.TemporaryDirectory() as folder:
        trees: dict[str, Path | None] = {"here": None}
        if options.commit:
            trees[options.commit] = install(options.commit, Path(folder))
        speeds = {
            rows: {name: {tree: list[float]() for tree in trees} for name in SAMPLERS}
            for rows in options.rows
        }
        for _ in range(options.repeats):
            for rows, found in speeds.items():
                for name, table in SAMPLERS.items():
                    spaced = [prompts[i * len(prompts) // rows] for i in range(rows)]
                    arguments = [json.dumps(x) for x in (table, model, spaced, options.new)]
                    for tree, site in trees.items():
                        found[name][tree].append(measure(MEASURE, site, *arguments))
    if options.json:
        print(json.dumps(speeds))
    else:
        report(speeds, options.commit)


def texts(pairs: Path | None, count: int) -> list[str]:
    """Prompts of several lengths."""
    if pairs is not None:
        found = [json.loads(line) for line in pairs.read_text().splitlines()]
        found = [found[i * len(found) // count] for i in range(count)]
        return [f"{each['language']}: {each['source']}\nen:" for each in found]
    whole = [path.read_text() for path in sorted((ROOT / "benchmarks/prompts").glob("*.txt"))]
    cuts = [whole[i % len(whole)] for i in range(count)]
    return [text[: len(text) - 24 * (i // len(whole))] for i, text in enumerate(cuts)]


def report(speeds: dict[int, dict[str, dict[str, list[float]]]], commit: str | None) -> None:
    """Print medians, ranges, and ratios to ``ar`` and to the other commit."""
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"bytes/s, median (min to max), of ar's; OMP_NUM_THREADS: {threads}")
    for rows, found in speeds.items():
        print(f"{rows} texts together")
        ar = statistics.median(found["ar"]["here"])
        for name, trees in found.items():
            here = statistics.median(trees["here"])
            line = f"  {name:<14} {told(trees['here'])}   {here / ar:.2f} x ar"
            if commit:
                other = statistics.median(trees[commit])
                line += f"   {commit} {told(trees[commit])}   {here / other:.2f} x"
            print(line)


if __name__ == "__main__":
    main()
