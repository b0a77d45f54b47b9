"""What the lossless samplers save, on three kinds of text: greedy, sampled, translated.

    OMP_NUM_THREADS=1 python benchmarks/lossless.py [--pairs corpora/translate/test.jsonl]
        [--kind NAME …] [--sampler SPEC …] [--speed RUNS] [--prompts FOLDER] [--json FILE]
        [--kernels fixed]

    greedy          demo:python goes on with the prompts of benchmarks/prompts/ (or FOLDER/*.txt),
                    200 bytes each
    sampled-0.8     the same, at temperature 0.8, three samples of each prompt
    sampled-1       at temperature 1
    translations    demo:translate with the pairs that scripts/fetch_translation_corpus.py makes;
                    a line end or EOS ends them. Needs --pairs

Each sampler runs on all texts, in batches; passes are counted a text as if it were alone, and
priced with the paper's 3B sizes. Every output is held against `ar`'s. "repeats" is the share of
16-byte runs of `ar`'s output that stood in the same text before: such text is easily drafted.

--speed RUNS then times the texts one by one (--timed of them, evenly spaced), all samplers in turn,
RUNS times: ratios to `ar` in the same run, their median and range. Nothing else should run then.

--lengths takes the samplers that `blt-auto` has to keep up with: the same cascade, always as long.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from blt_core.cli.progress import progress_bar
from blt_core.compare import repeats
from blt_core.errors import BltError, DataError
from blt_core.kernels.native import native_hash
from blt_core.pipeline import Generation, Pipeline
from blt_core.published import SCALES
from blt_core.types import Passes, RoundCounts

PROMPTS = Path(__file__).parent / "prompts"
SCALE = SCALES["3b"]
SAMPLES = 3
CODE = {"max_new_bytes": 200, "seed": 0}
#: The settings of each kind's requests.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {**CODE, "temperature": 0.0},
    "sampled-0.8": {**CODE, "temperature": 0.8},
    "sampled-1": {**CODE, "temperature": 1.0},
    "translations": {"max_new_bytes": 300, "temperature": 0.0, "stop": "\n"},
}
#: With the prices that all are priced with.
AUTO = "blt-auto cost.use=per-pass"
SAMPLERS = (
    "blt-s draft_bytes=4",
    "blt-s draft_bytes=8",
    "blt-s draft_bytes=16",
    "blt-dv block_bytes=8",
    "blt-lookup",
    "blt-cascade draft_bytes=4",
    "blt-cascade draft_bytes=8",
    "blt-cascade draft_bytes=16",
    "blt-cascade",
    "blt-cascade draft_bytes=32",
    AUTO,
)
#: Fixed lengths of the cascade, and the adaptive one, which may cost 3 % more than the best of them
#: and `ar`.
LENGTHS = (*(f"blt-cascade draft_bytes={n}" for n in (4, 8, 16, 24, 32)), AUTO)


@attrs.frozen
class Texts:
    """What a kind asks of which model. settings: of each request."""

    kind: str
    checkpoint: str
    prompts: tuple[str, ...]
    settings: Mapping[str, Any]

    def requests(self, pipeline: Pipeline) -> list[tuple[bytes, int]]:
        """(prompt, seed) of each text."""
        asked = pipeline.requests(self.prompts, **self.settings)
        return [(each.prompt, each.seed) for each in asked]

    def of_one(self) -> dict[str, Any]:
        """The settings without seed and samples, which each text has for itself."""
        return {key: v for key, v in self.settings.items() if key not in ("seed", "samples")}


def main() -> None:
    """Run, count and print."""
    options = parse()
    try:
        kinds = options.kind or [k for k in KINDS if k != "translations" or options.pairs]
        chosen = [texts_of(kind, options) for kind in kinds]
        machine = {"threads": torch.get_num_threads(), "cpu": processor()}
        machine["kernels"] = options.kernels
        machine["native"] = options.kernels == "measured" and native_hash() is not None
        told = f"{machine['cpu']}, {machine['threads']} threads, {options.kernels} kernels"
        told += ", the native one among them" if machine["native"] else ""
        print(told, flush=True)
        found = []
        for texts in chosen:
            found.append(of_kind(texts, options))
            print("\n" + table(found[-1]), flush=True)
            if options.json:
                report = {**machine, "cost_parameters": "3b", "kinds": found}
                options.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    except BltError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, metavar="FILE")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, metavar="FOLDER")
    parser.add_argument("--kind", action="append", choices=KINDS)
    samplers = parser.add_mutually_exclusive_group()
    samplers.add_argument("--sampler", action="append", metavar="SPEC")
    samplers.add_argument(
        "--lengths", dest="sampler", action="store_const", const=LENGTHS, help="blt-auto, and fixed"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="N pairs, evenly spaced")
    parser.add_argument("--batch", type=positive, default=24)
    parser.add_argument("--speed", type=positive, metavar="RUNS")
    parser.add_argument("--timed", type=positive, default=24, metavar="N", help="texts to time")
    parser.add_argument("--kernels", choices=("measured", "fixed"), default="measured")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def positive(text: str) -> int:
    """A number from 1 on."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def texts_of(kind: str, options: argparse.Namespace) -> Texts:
    """The prompts of a kind; DataError for pairs that are not given or not there."""
    settings = KINDS[kind]
    if kind != "translations":
        prompts = tuple(path.read_text("utf-8") for path in sorted(options.prompts.glob("*.txt")))
        if not prompts:
            raise DataError(f"{options.prompts}: no prompts *.txt")
        samples = {"samples": SAMPLES if settings["temperature"] else 1}
        return Texts(kind, "demo:python", prompts, {**settings, **samples})
    if options.pairs is None:
        raise DataError("translations need --pairs, made by scripts/fetch_translation_corpus.py")
    try:
        lines = options.pairs.read_text("utf-8").splitlines()
        pairs = [json.loads(line) for line in lines]
        prompts = tuple(f"{each['language']}: {each['source']}\nen:" for each in pairs)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{options.pairs}: not read: {error!r}") from error
    return Texts(kind, "demo:translate", tuple(spaced(prompts, options.limit)), settings)


def spaced(items: Sequence[Any], count: int | None) -> list[Any]:
    """At most ``count`` of the items, evenly spaced from the first on."""
    count = min(count or len(items), len(items))
    return [items[index * len(items) // count] for index in range(count)]


def of_kind(texts: Texts, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of all samplers on one kind of text; ``ar`` is the first of them."""
    run = {"checkpoint": texts.checkpoint, "kernels": options.kernels}
    pipeline = Pipeline.from_config({"schema": 1, "run": run})
    pipelines = {"ar": pipeline.with_sampler("ar")}
    for spec in options.sampler or SAMPLERS:
        if options.sampler or "blt-dv" not in spec or pipeline.model.decoder.denoises:
            pipelines[spec] = pipeline.with_sampler(spec)
    requests = texts.requests(pipeline)
    samplers: list[dict[str, Any]] = []
    expected: list[Generation] = []
    with progress_bar() as bar:
        for name, each in pipelines.items():
            task = bar.add_task(f"{texts.kind}: {name}", total=len(requests))
            results = []
            for batch in in_batches(requests, options.batch):
                results += answer(each, batch, texts.of_one())
                bar.advance(task, len(batch))
            expected = expected or results
            samplers.append(figures(name, each, results, expected))
        for each in samplers:
            each["relative_gigabytes"] = each["gigabytes"] / samplers[0]["gigabytes"]
        if options.speed:
            timed = spaced(requests, options.timed)
            task = bar.add_task(f"{texts.kind}: speed", total=options.speed * len(pipelines))
            speeds = [rates(pipelines, timed, texts, bar, task) for _ in range(options.speed)]
            for each in samplers:
                ratios = [run[each["sampler"]] / run["ar"] for run in speeds]
                each["relative_speed"] = summary(ratios)
                each["bytes_per_second"] = summary([run[each["sampler"]] for run in speeds])
    return {
        "kind": texts.kind,
        "model": texts.checkpoint,
        "texts": len(requests),
        "bytes": sum(len(each.output) for each in expected),
        "repeats": repeats([each.output for each in expected]),
        "timed": min(options.timed, len(requests)) if options.speed else 0,
        "runs": options.speed or 0,
        "samplers": samplers,
    }


def in_batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """The items, those with prompts of similar length together."""
    ordered = sorted(items, key=lambda item: len(item[0]))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def answer(
    pipeline: Pipeline, batch: Sequence[tuple[bytes, int]], settings: Mapping[str, Any]
) -> list[Generation]:
    """The generations of a batch of (prompt, seed)."""
    prompts, seeds = zip(*batch, strict=True)
    return pipeline.generate(list(prompts), seed=list(seeds), **settings)


def rates(
    pipelines: Mapping[str, Pipeline], timed: Sequence[Any], texts: Texts, bar: Any, task: Any
) -> dict[str, float]:
    """New bytes a second of each sampler, reading the prompts included; texts go round them."""
    seconds, size = dict.fromkeys(pipelines, 0.0), dict.fromkeys(pipelines, 0)
    for each in timed:
        for name, pipeline in pipelines.items():
            began = time.perf_counter()
            [result] = answer(pipeline, [each], texts.of_one())
            seconds[name] += time.perf_counter() - began
            size[name] += len(result.output)
            bar.advance(task, 1 / len(timed))
    return {name: size[name] / seconds[name] for name in pipelines}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def figures(
    name: str, pipeline: Pipeline, results: Sequence[Generation], expected: Sequence[Generation]
) -> dict[str, Any]:
    """Counts and costs of one sampler."""
    passes = sum((each.passes for each in results), Passes())
    counts = sum((each.counts for each in results), RoundCounts())
    drafted = sum(each.drafted for each in results)
    same = sum(a.ids == b.ids for a, b in zip(results, expected, strict=True))
    return {
        "sampler": name,
        "identical": same,
        "texts": len(results),
        "bytes_per_round": counts.bytes_per_round,
        "drafted": drafted,
        "accepted": sum(each.accepted for each in results),
        "n_dec": passes.decoder,
        "n_enc": passes.encoder,
        "gigabytes": pipeline.price(passes, SCALE).gigabytes,
    }


def table(kind: dict[str, Any]) -> str:
    """The figures of a kind as text."""
    size = f"{kind['texts']} texts, {kind['bytes']:,} bytes, {kind['repeats']:.0%} repeats"
    heads = (
        f"{'same':>9} {'bytes/round':>11} {'accepted':>8} {'N_dec':>7} {'N_enc':>6} {'GB/ar':>6}"
    )
    speed = "  speed/ar" if kind["runs"] else ""
    lines = [f"{kind['kind']}: {kind['model']}, {size}", f"{'':<34} {heads}{speed}"]
    for each in kind["samplers"]:
        accepted = f"{each['accepted'] / each['drafted']:.0%}" if each["drafted"] else "–"
        line = (
            f"{each['sampler']:<34} {each['identical']:>4}/{each['texts']:<4} "
            f"{each['bytes_per_round'] or 0:>11.2f} {accepted:>8} {each['n_dec']:>7} "
            f"{each['n_enc']:>6} {each['relative_gigabytes']:>6.3f}"
        )
        if speed := each.get("relative_speed"):
            line += f"  {speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})"
        lines.append(line)
    costs = {each["sampler"]: each["gigabytes"] for each in kind["samplers"]}
    if set(LENGTHS) <= set(costs):
        best = min(("ar", *LENGTHS[:-1]), key=lambda name: costs[name])
        lines.append(f"{AUTO} costs {costs[AUTO] / costs[best]:.3f} x what {best} does")
    return "\n".join(lines)


def processor() -> str:
    """The CPU's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return "unknown CPU"
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "CPU")


if __name__ == "__main__":
    main()
