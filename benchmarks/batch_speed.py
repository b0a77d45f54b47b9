"""Throughput of batches: bytes/s of 1, 8 and 32 texts that run together, of ``ar`` and of drafting.

    python benchmarks/batch_speed.py [--rows 1 8 32] [--commit REV] [--pairs FILE] [--json]

Samplers take turns in one process, and commits in several; the time of the prompts is left out.
Texts continue the held-out prompts of ``benchmarks/prompts``, cut at several lengths, at
``--temperature 0.8``: greedy ones of so small a model repeat themselves. With ``--pairs`` they
translate the sources of a JSON Lines file, greedily. Up to 8 rows the same 8 texts are generated,
in batches. "repeats" is the share of 16-byte runs of ``ar``'s texts that stood in the same text
before. With ``--commit`` each is measured with another commit's code too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from inner_loop import ROOT, install, measure, told

SAMPLERS = {
    "ar": {"use": "ar"},
    "blt-s 4": {"use": "blt-s", "draft_bytes": 4},
    "blt-s 8": {"use": "blt-s", "draft_bytes": 8},
    "blt-lookup 8": {"use": "blt-lookup", "draft_bytes": 8},
    "blt-cascade 16": {"use": "blt-cascade", "draft_bytes": 16},
    "blt-auto": {"use": "blt-auto", "cost": {"use": "per-pass"}},
}
#: Texts of a measurement, at least: one alone says little.
FEWEST = 8

#: Run in a process with a commit's own code: for each sampler bytes/s of batches after their first
#: rounds, and the share of repeats. A batch of each sampler is measured before the next batch is.
MEASURE = """
import json, sys, time
from blt_core import Pipeline

samplers, model, prompts, rows, request = (json.loads(text) for text in sys.argv[1:])
tables = [{"schema": 1, "run": {"checkpoint": model}, "sampler": each} for each in samplers]
pipelines = [Pipeline.from_config(table) for table in tables]
for pipeline in pipelines:
    for step in pipeline.steps(prompts[:2], max_new_bytes=8):
        pass
seconds, count, runs = ([0.0] * len(samplers), [0] * len(samplers), [[] for _ in samplers])
for at in range(0, len(prompts), rows):
    batch = prompts[at : at + rows]
    seeds = list(range(at, at + len(batch)))
    for index, pipeline in enumerate(pipelines):
        began = None
        for step in pipeline.steps(batch, seed=seeds, **request):
            if began is None:
                began = time.perf_counter()
            else:
                count[index] += sum(len(each) for each in step.new)
        seconds[index] += time.perf_counter() - began
        texts = [each.output for each in step.progress]
        runs[index] += [[text[i : i + 16] for i in range(len(text) - 15)] for text in texts]
repeated = [sum(len(each) - len(set(each)) for each in own) for own in runs]
shares = [many / max(sum(map(len, own)), 1) for many, own in zip(repeated, runs)]
print(json.dumps([[n / s for n, s in zip(count, seconds)], shares]))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--commit", help="measure its code too")
    parser.add_argument("--pairs", type=Path, help="translate sources of this file")
    parser.add_argument("--new", type=int, default=100, help="bytes generated of each prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.samplers = list(dict.fromkeys(["ar", *options.samplers]))
    with tempfile.TemporaryDirectory() as folder:
        trees: dict[str, Path | None] = {"here": None}
        if options.commit:
            trees[options.commit] = install(options.commit, Path(folder))
        found = {rows: of_rows(rows, trees, options) for rows in options.rows}
    if options.json:
        print(json.dumps(found))
    else:
        report(found, options.commit)


def of_rows(
    rows: int, trees: dict[str, Path | None], options: argparse.Namespace
) -> dict[str, Any]:
    """Bytes/s of each sampler with each tree in batches of so many rows, and ``ar``'s repeats."""
    model = "demo:translate" if options.pairs else "demo:python"
    request = {"max_new_bytes": options.new, "temperature": options.temperature}
    if options.pairs:
        request |= {"temperature": 0.0, "stop": "\n"}
    prompts = texts(options.pairs, max(rows, FEWEST))
    speeds = {name: {tree: list[float]() for tree in trees} for name in options.samplers}
    shares = []
    for repeat in range(options.repeats):
        turn = repeat % len(speeds)
        names = [*options.samplers[turn:], *options.samplers[:turn]]
        asked = ([SAMPLERS[name] for name in names], model, prompts, rows, request)
        for tree, site in trees.items():
            found = measure(MEASURE, site, *(json.dumps(each) for each in asked))
            for name, speed, share in zip(names, *found, strict=True):
                speeds[name][tree].append(speed)
                shares += [share] if (name, tree) == ("ar", "here") else []
    return {"texts": len(prompts), "repeats": statistics.median(shares), "speeds": speeds}


def texts(pairs: Path | None, count: int) -> list[str]:
    """Prompts of several lengths."""
    if pairs is not None:
        found = [json.loads(line) for line in pairs.read_text().splitlines()]
        found = [found[i * len(found) // count] for i in range(count)]
        return [f"{each['language']}: {each['source']}\nen:" for each in found]
    whole = [path.read_text() for path in sorted((ROOT / "benchmarks/prompts").glob("*.txt"))]
    cuts = [whole[i % len(whole)] for i in range(count)]
    return [text[: len(text) - 24 * (i // len(whole))] for i, text in enumerate(cuts)]


def report(found: dict[int, dict[str, Any]], commit: str | None) -> None:
    """Print medians, ranges, and ratios to ``ar`` and to the other commit."""
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"bytes/s, median (min to max), of ar's; OMP_NUM_THREADS: {threads}")
    for rows, each in found.items():
        print(f"{rows} together, {each['texts']} texts, {each['repeats']:.0%} repeats")
        ar = statistics.median(each["speeds"]["ar"]["here"])
        for name, trees in each["speeds"].items():
            here = statistics.median(trees["here"])
            line = f"  {name:<14} {told(trees['here'])}   {here / ar:.2f} x ar"
            if commit:
                other = statistics.median(trees[commit])
                line += f"   {commit} {told(trees[commit])}   {here / other:.2f} x"
            print(line)


if __name__ == "__main__":
    main()
