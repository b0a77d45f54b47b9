"""BLEU and chrF of a model that translates to English, and what its generation costs.

    python benchmarks/translation_bleu.py MODEL --pairs corpora/translate/test.jsonl
        [--sampler "blt-s draft_bytes=8"] [--limit N] [--language fr] [--json]

MODEL is a checkpoint folder or demo:NAME; the pairs are those that
scripts/fetch_translation_corpus.py makes (--limit: at most N of each language, evenly spaced). Each
prompt, `prompt_of(language, source)`, is continued greedily until EOS or a line end, in batches of
prompts of similar length. BLEU is sacrebleu's over the corpus, with its default tokenizer, 13a;
beside it stands what copying the source scores. bytes/s is all output by all time, that of reading
the prompts included.

--sampler may be repeated; without it `ar` runs. Outputs are held against those of the first one,
byte by byte: put `ar` first to see whether another gives `ar`'s bytes. Needs sacrebleu.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from blt_core.cli.progress import progress_bar
from blt_core.errors import BltError, DataError
from blt_core.pipeline import Generation, Pipeline
from blt_core.types import Passes

EXAMPLES = 5
WARM_UP_BYTES = 4
LINE_END = "\n"


@attrs.frozen
class Pair:
    """A text in a language, and its English."""

    language: str
    source: str
    target: str


@attrs.frozen
class Run:
    """What one sampler gave: a generation for each pair, and the seconds that all of them took."""

    sampler: str
    results: tuple[Generation, ...]
    seconds: float


def main() -> None:
    """Translate, score and print."""
    options = parse()
    try:
        metrics = Metrics()
        pairs = choose(read_pairs(options.pairs), options.language, options.limit)
        run = {"checkpoint": options.model, "device": options.device, "dtype": options.dtype}
        given = {key: value for key, value in run.items() if value is not None}
        pipeline = Pipeline.from_config({"schema": 1, "run": given})
        runs = translate(pipeline, options.sampler or ["ar"], pairs, options)
    except BltError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    figures = {
        "model": options.model,
        "pairs": str(options.pairs),
        "threads": torch.get_num_threads(),
        "device": pipeline.settings.device,
        "dtype": pipeline.settings.dtype,
        "batch": options.batch,
        "max_new_bytes": options.max_new_bytes,
        "signatures": metrics.signatures,
        "copy": metrics.scores(pairs, [pair.source for pair in pairs]),
        "samplers": [figures_of(run, runs[0], pairs, metrics) for run in runs],
        "examples": examples(pairs, runs[0]),
    }
    print(json.dumps(figures, ensure_ascii=False) if options.json else table(figures))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a checkpoint folder, or demo:NAME")
    parser.add_argument("--pairs", type=Path, required=True, help="a file of JSON Lines")
    parser.add_argument("--sampler", action="append", help="repeatable; the first is the reference")
    parser.add_argument("--language", help="only pairs of this language: fr or de")
    parser.add_argument("--limit", type=positive, help="at most so many pairs of each language")
    parser.add_argument("--max-new-bytes", type=positive, default=300)
    parser.add_argument("--batch", type=positive, default=16, help="prompts that run together")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps …")
    parser.add_argument("--dtype", help="float32, bfloat16 or float64")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def positive(text: str) -> int:
    """A number of at least 1; argparse names the option of a ValueError."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


# -- the pairs ------------------------------


def prompt_of(language: str, source: str) -> str:
    """What a model continues with a space and the English of ``source``."""
    return f"{language}: {source}\nen:"


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file; DataError with the line of one that is of another format."""
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: the pairs cannot be read ({error}). scripts/fetch_translation_corpus.py "
            "--output corpora/translate makes corpora/translate/test.jsonl"
        ) from error
    return [read_pair(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def read_pair(line: str, place: str) -> Pair:
    """The pair of one line, whose ``text`` must be the document that this benchmark prompts for."""
    try:
        record = json.loads(line)
        pair = Pair(*(record[key] for key in ("language", "source", "target")))
        text = record["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{place}: expected an object with text, language, source and target ({error!r})"
        ) from error
    expected = f"{prompt_of(pair.language, pair.source)} {pair.target}"
    if text != expected:
        raise DataError(
            f"{place}: the document is {text!r}, but prompts are made for {expected!r}. "
            "Fetch the corpus anew with scripts/fetch_translation_corpus.py"
        )
    return pair


def choose(pairs: Sequence[Pair], language: str | None, limit: int | None) -> list[Pair]:
    """At most ``limit`` pairs of each language, or of one, evenly spaced. DataError for none."""
    languages = dict.fromkeys(pair.language for pair in pairs)
    if language not in (None, *languages):
        there = ", ".join(languages)
        raise DataError(f"--language {language}: no such pairs. Languages in the file: {there}")
    chosen: list[Pair] = []
    for each in [language] if language else languages:
        own = [pair for pair in pairs if pair.language == each]
        chosen += spaced(own, limit or len(own))
    return chosen


def spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the items, evenly spaced from the first on."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


# -- the translations ------------------------------


def translate(
    pipeline: Pipeline, samplers: Sequence[str], pairs: Sequence[Pair], options: argparse.Namespace
) -> list[Run]:
    """Run each sampler on all pairs; RequestError, before any work, for what cannot be served."""
    prompts = [prompt_of(pair.language, pair.source) for pair in pairs]
    request = {
        "max_new_bytes": options.max_new_bytes,
        "stop": LINE_END,
        "temperature": 0.0,
    }
    pipelines = {name: pipeline.with_sampler(name) for name in samplers}
    for each in pipelines.values():
        each.check(prompts, **request)
    runs = []
    with progress_bar() as bar:
        for name, each in pipelines.items():
            task = bar.add_task(name, total=len(prompts))
            results, seconds = generate(
                each,
                prompts,
                options.batch,
                request,
                lambda done, task=task: bar.advance(task, done),
            )
            runs.append(Run(name, results, seconds))
    return runs


def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    batch: int,
    request: dict[str, Any],
    advance: Callable[[int], None],
) -> tuple[tuple[Generation, ...], float]:
    """The generations of all prompts in their order, and the seconds they took.

    Batches hold prompts of similar length, for a batch pads to its longest. What a machine does
    once is done in a short run that is not timed. advance(prompts) is called after each batch.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].encode()))
    pipeline.generate(prompts[0], **{**request, "max_new_bytes": WARM_UP_BYTES})
    results: dict[int, Generation] = {}
    seconds = 0.0
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        began = time.perf_counter()
        done = pipeline.generate([prompts[row] for row in rows], **request)
        seconds += time.perf_counter() - began
        results |= dict(zip(rows, done, strict=True))
        advance(len(rows))
    return tuple(results[index] for index in range(len(prompts))), seconds


def output_of(result: Generation) -> str:
    """The translation: the output without the space before it and the line end after it."""
    return result.text.strip()


# -- scores and figures ------------------------------


class Metrics:
    """Corpus BLEU and chrF2 by sacrebleu; DataError with the fix if it is not installed."""

    def __init__(self) -> None:
        try:
            from sacrebleu.metrics import BLEU, CHRF
        except ImportError as error:
            raise DataError(
                "BLEU is sacrebleu's, which is not installed: pip install 'blt-core[bleu]'"
            ) from error
        self._metrics = {"bleu": BLEU(), "chrf": CHRF()}
        for metric in self._metrics.values():
            metric.corpus_score(["a"], [["a"]])  # a signature counts the references it has met

    @property
    def signatures(self) -> dict[str, str]:
        """The settings and version behind the scores, as papers cite them."""
        return {name: str(metric.get_signature()) for name, metric in self._metrics.items()}

    def scores(self, pairs: Sequence[Pair], outputs: Sequence[str]) -> dict[str, dict[str, Any]]:
        """For each language: pairs, bleu and chrf (0 to 100) of the outputs."""
        scores: dict[str, dict[str, Any]] = {}
        for language in dict.fromkeys(pair.language for pair in pairs):
            own = [
                (output, pair.target)
                for pair, output in zip(pairs, outputs, strict=True)
                if pair.language == language
            ]
            hypotheses, references = map(list, zip(*own, strict=True))
            scores[language] = {"pairs": len(own)}
            for name, metric in self._metrics.items():
                scores[language][name] = metric.corpus_score(hypotheses, [references]).score
        return scores


def figures_of(run: Run, reference: Run, pairs: Sequence[Pair], metrics: Metrics) -> dict[str, Any]:
    """Scores, costs and speed of one run, and how many outputs are the reference's bytes."""
    results = run.results
    passes = sum((result.passes for result in results), start=Passes())
    size = total(len(result.output) for result in results)
    return {
        "sampler": run.sampler,
        "scores": metrics.scores(pairs, [output_of(result) for result in results]),
        "same_bytes": total(
            own.output == other.output
            for own, other in zip(results, reference.results, strict=True)
        ),
        "outputs": len(results),
        "n_dec": passes.decoder,
        "n_enc": passes.encoder,
        "drafted": total(result.drafted for result in results),
        "accepted": total(result.accepted for result in results),
        "gigabytes": sum(result.cost.gigabytes for result in results),
        "bytes": size,
        "seconds": run.seconds,
        "bytes_per_second": size / run.seconds,
        "stopped": dict(Counter(str(result.stop_reason) for result in results)),
    }


def total(values: Iterable[int]) -> int:
    """The sum, a whole number also of truth values."""
    return int(sum(values))


def examples(pairs: Sequence[Pair], run: Run) -> list[dict[str, str]]:
    """A few pairs with their translations."""
    return [
        {**attrs.asdict(pair), "output": output_of(result)}
        for pair, result in spaced(list(zip(pairs, run.results, strict=True)), EXAMPLES)
    ]


def table(figures: dict[str, Any]) -> str:
    """The figures as text."""
    samplers = figures["samplers"]
    lines = [f"{figures['model']} on {figures['pairs']}, {figures['device']}, {figures['dtype']}"]
    lines += [f"{name}: {text}" for name, text in figures["signatures"].items()]
    lines.append(f"{'':<44} {'pairs':>6} {'BLEU':>6} {'chrF':>6}")
    for language in figures["copy"]:
        rows = {"copy of the source": figures["copy"][language]}
        rows |= {each["sampler"]: each["scores"][language] for each in samplers}
        for name, score in rows.items():
            scores = f"{score['pairs']:6} {score['bleu']:6.2f} {score['chrf']:6.2f}"
            lines.append(f"{language}  {name:<40} {scores}")
    lines.append(f"{figures['threads']} threads, batches of {figures['batch']}")
    lines += [costs(each, samplers[0]["sampler"]) for each in samplers]
    for example in figures["examples"]:
        lines += ["", *(f"{key:<9} {text}" for key, text in example.items() if key != "language")]
    return "\n".join(lines)


def costs(figures: dict[str, Any], reference: str) -> str:
    """One sampler's line of costs."""
    stops = ", ".join(f"{reason} {count}" for reason, count in figures["stopped"].items())
    same = f", same bytes as {reference}: {figures['same_bytes']} of {figures['outputs']}"
    return (
        f"  {figures['sampler']}: {figures['bytes']} bytes, "
        f"{figures['bytes_per_second']:.1f} bytes/s, "
        f"N_dec {figures['n_dec']}, N_enc {figures['n_enc']}, "
        f"accepted {figures['accepted']} of {figures['drafted']}, {figures['gigabytes']:.2f} GB, "
        f"stopped by {stops}{'' if figures['sampler'] == reference else same}"
    )


if __name__ == "__main__":
    main()
