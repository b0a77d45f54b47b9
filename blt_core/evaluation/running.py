"""Tasks with samplers: what each scores, and what it costs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from blt_core.compare import explain, repeats
from blt_core.errors import RequestError
from blt_core.evaluation.asking import Asker, Silent, Watch
from blt_core.evaluation.data import spaced
from blt_core.evaluation.figures import Figure, Interval, interval, relative
from blt_core.evaluation.options import RunOptions
from blt_core.evaluation.protocol import Answer, Part, Question, Task
from blt_core.evaluation.sandbox import make_sandbox
from blt_core.evaluation.store import Store
from blt_core.execution import threads_of
from blt_core.faults import broken
from blt_core.model import Model
from blt_core.pipeline import Pipeline
from blt_core.types import GIGABYTES, Parameters, Passes, Sampling, seed_of_sample

#: The sampler that all others are held against.
REFERENCE = "ar"
#: What likelihood tasks are reported under.
MODEL = "model"
#: Passes of encoder and global model that the paper's autoregressive baseline makes for 512 bytes.
PAPER_PASSES = 308 / 512


@attrs.frozen
class Scored:
    """One sampler on a part of a task.

    name, spec: of the sampler. scores: by name; of_ar: their ratios to the reference's. The rest is
    None for tasks that generate nothing. cost: for the counts that price passes, own_cost:
    for the model's own, in cost_unit. relative_cost: to ``ar``'s; relative_cost_paper: to the
    paper's baseline, which runs its encoder and global model 308 times for 512 bytes.
    identical: whether all outputs are ``ar``'s (None where they are in distribution alone); same of
    outputs are; near_ties: how many of the others part from it at a near-tie of two logits, or of
    an entropy and the threshold, as runs of different shapes may (None where nothing promises
    ``ar``'s bytes). agreement: share of ``ar``'s bytes that stand in the same places.
    repeats: share of the runs of 16 bytes in outputs that stood in the same output before.
    bytes_per_second: of timed questions, or else of whole batches. errors: questions without an
    answer, which count as empty ones; first_error: of these, with its key. Costs and agreement
    relative to ``ar`` are of the questions that both have answered, scores of all.
    """

    name: str
    spec: str
    scores: Mapping[str, Interval]
    of_ar: Mapping[str, Interval]
    passes: Passes | None = None
    bytes: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    cost: float | None = None
    own_cost: float | None = None
    relative_cost: float | None = None
    relative_cost_paper: float | None = None
    cost_unit: str | None = None
    identical: bool | None = None
    same: int | None = None
    outputs: int | None = None
    near_ties: int | None = None
    agreement: float | None = None
    repeats: float | None = None
    bytes_per_second: float | None = None
    errors: int = 0
    first_error: str | None = None

    def in_gigabytes(self, cost: float | None) -> float | None:
        """One of the costs, where it is weight traffic; None in another unit."""
        return cost if self.cost_unit == GIGABYTES else None


@attrs.frozen
class PartResult:
    """A part of a task with all samplers. told: what the task says of it."""

    name: str
    items: int
    samplers: tuple[Scored, ...]
    told: Mapping[str, Any]


@attrs.frozen(eq=False)
class Answered:
    """What a sampler has answered of a task, and how fast."""

    pipeline: Pipeline
    parts: Sequence[Part]
    questions: Mapping[str, Question]
    answers: Mapping[str, Answer]
    speed: float | None


def run_task(
    pipeline: Pipeline,
    name: str,
    task: Task,
    samplers: Sequence[str],
    options: RunOptions,
    watch: Watch | None = None,
) -> list[PartResult]:
    """All parts of a task with each sampler, ``ar`` among them.

    name: what the task is called, and its answers are kept under. A task that only scores given
    texts is run once. Raises RequestError for a sampler with one, before any work.
    """
    check_task(name, task, samplers, options)
    watch = watch or Silent()
    if task.asks == "likelihood":
        answered = _answered(pipeline, name, MODEL, task, options, watch)
        return [_unsampled(name, part, options) for part in answered.parts]
    listed = list(dict.fromkeys(samplers or (REFERENCE,)))
    first = [REFERENCE] if REFERENCE not in listed else []
    pipelines = {spec: pipeline.with_sampler(spec) for spec in (*first, *listed)}
    found = {
        spec: _answered(each, name, spec, task, options, watch) for spec, each in pipelines.items()
    }
    reference = found[REFERENCE]
    return [
        PartResult(
            _full_name(name, part.name),
            part.items,
            tuple(_scored(spec, found[spec], index, reference, options) for spec in found),
            part.told,
        )
        for index, part in enumerate(reference.parts)
    ]


def check_task(name: str, task: Task, samplers: Sequence[str], options: RunOptions) -> None:
    """Raise RequestError or DataError for what no run of the task could do."""
    if task.asks not in ("text", "likelihood"):
        raise broken(task, f"asks = {task.asks!r}; expected 'text' or 'likelihood'", "task.asks")
    if task.asks == "likelihood" and samplers:
        raise RequestError(
            f"--sampler: the task {name!r} scores given texts, which no sampler changes; leave it "
            "out, or run that task by itself"
        )
    if getattr(task, "executes", False):
        make_sandbox(allowed=options.allow_code, unsafe=options.unsafe, seconds=1)


def _answered(
    pipeline: Pipeline, name: str, spec: str, task: Task, options: RunOptions, watch: Watch
) -> Answered:
    path = _path(options.folder, name, spec)
    store = Store(path, _settings(pipeline, name, spec, options) if path is not None else {})
    title = f"{name}: {spec}"
    asker = Asker(pipeline, store, options, watch, title)
    try:
        parts = _checked(task.run(asker, options.limit), task, asker)
        speed = _timed(asker, options, watch, title)
    finally:
        store.close()
    return Answered(pipeline, parts, asker.questions, asker.answers, speed)


def _checked(parts: Any, task: Task, asker: Asker) -> Sequence[Part]:
    """What a task gave; ComponentError, which names it, for what breaks its contract."""
    if not isinstance(parts, Sequence) or not all(isinstance(part, Part) for part in parts):
        raise broken(task, f"run gave {parts!r}; expected a list of Part", "task.parts")
    if not parts:
        raise broken(task, "run gave no part", "task.parts")
    for part in parts:
        strange = [key for key in part.keys if key not in asker.answers]
        if strange:
            raise broken(task, f"part {part.name!r}: no question has the key {strange[0]!r}")
        for name, figure in part.figures.items():
            if not isinstance(figure, Figure):
                raise broken(task, f"figure {name!r}: expected a Figure, got {figure!r}")
    return parts


def _timed(asker: Asker, options: RunOptions, watch: Watch, title: str) -> float | None:
    """Bytes a second of ``timed`` questions, evenly spaced, one by one; None without any."""
    answered = [asker.questions[key] for key, each in asker.answers.items() if each.error is None]
    questions = spaced(answered, options.timed)
    if not questions:
        return None
    done = watch.begin(f"{title}, timed", len(questions))
    speed = asker.time(questions)
    done(len(questions))
    return speed


def _settings(pipeline: Pipeline, name: str, spec: str, options: RunOptions) -> dict[str, Any]:
    """What answers depend on, beside their questions, whose keys tell the rest."""
    plan = pipeline.plan
    sampler = plan.node("sampler").describe() if spec != MODEL else {}
    return {
        "task": name,
        "sampler": sampler,
        "model": pipeline.model.digest(),
        "dtype": pipeline.settings.dtype,
        "kernels": json.loads(pipeline.model.kernel_choice or "null"),
        "device": pipeline.settings.device,
        "batch": options.batch,
        "seed": options.seed,
        "limit": options.limit,
        "torch": torch.__version__,
        "threads": threads_of(plan.build("executor") if options.workers is not None else None),
        **({"compile": True} if pipeline.settings.compile else {}),
    }


def _path(folder: Path | None, name: str, spec: str) -> Path | None:
    if folder is None:
        return None
    # Names that differ in signs alone must not share a file.
    mark = hashlib.blake2b(spec.encode(), digest_size=3).hexdigest()
    return folder / _slug(name) / f"{_slug(spec)}-{mark}.jsonl"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:80].strip("-.") or "task"


def _full_name(name: str, part: str) -> str:
    return f"{name}/{part}" if part else name


def _intervals(figures: Mapping[str, Figure], seed: int) -> dict[str, Interval]:
    return {name: interval(figure, seed) for name, figure in figures.items()}


def _unsampled(name: str, part: Part, options: RunOptions) -> PartResult:
    return PartResult(
        _full_name(name, part.name),
        part.items,
        (Scored(MODEL, MODEL, _intervals(part.figures, options.seed), {}),),
        part.told,
    )


def _scored(
    spec: str, found: Answered, index: int, reference: Answered, options: RunOptions
) -> Scored:
    part, expected = found.parts[index], reference.parts[index]
    if not part.keys:  # it only scores given texts
        intervals = _intervals(part.figures, options.seed)
        return Scored(found.pipeline.sampler_name, spec, intervals, {})
    answers = [found.answers[key] for key in part.keys]
    errors = [(key, found.answers[key].error) for key in part.keys]
    wrong = [f"{key}: {error}" for key, error in errors if error is not None]
    both = _keys_of_both(found, reference, part.keys)
    pairs = [(found.answers[key], reference.answers[key]) for key in both]
    passes = sum((answer.passes for answer in answers), Passes())
    size = sum(len(output) for answer in answers for output in answer.outputs)
    parameters = options.parameters
    price = found.pipeline.price(passes, parameters)
    cost = float(price.total)
    reference_cost = _cost(reference, both, parameters)
    seconds = sum(answer.seconds for answer in answers)
    speed = size / seconds if seconds else None
    ratios = {
        name: ratio
        for name, figure in part.figures.items()
        if (ratio := relative(figure, expected.figures[name], options.seed)) is not None
    }
    in_law = _samples(found, part.keys) and any(
        bool(getattr(each.pipeline.sampler, "in_law", False)) for each in (found, reference)
    )
    same, outputs = _same(pairs), sum(len(answer.outputs) for answer, _ in pairs)
    # A sampler that can tell the likelihoods of what it writes has verified it.
    promised = not in_law and getattr(found.pipeline.sampler, "true_logits", False)
    return Scored(
        name=found.pipeline.sampler_name,
        spec=spec,
        scores=_intervals(part.figures, options.seed),
        of_ar=ratios,
        passes=passes,
        bytes=size,
        drafted=sum(answer.drafted for answer in answers),
        accepted=sum(answer.accepted for answer in answers),
        cost=cost,
        own_cost=float(found.pipeline.price(passes).total),
        relative_cost=_cost(found, both, parameters) / reference_cost if reference_cost else None,
        cost_unit=price.unit,
        relative_cost_paper=_to_paper(found.pipeline, cost, size, parameters),
        identical=None if in_law or not outputs else same == outputs,
        same=same,
        outputs=outputs,
        near_ties=_near_ties(found, reference, both) if promised else None,
        agreement=_agreement(pairs),
        repeats=repeats(output for answer in answers for output in answer.outputs),
        bytes_per_second=speed if found.speed is None else found.speed,
        errors=len(wrong),
        first_error=wrong[0] if wrong else None,
    )


def _keys_of_both(found: Answered, reference: Answered, keys: Sequence[str]) -> list[str]:
    """Of the questions that both have answered."""
    sides = (found.answers, reference.answers)
    return [key for key in keys if all(answers[key].error is None for answers in sides)]


def _cost(found: Answered, keys: Sequence[str], parameters: Parameters | None) -> float:
    passes = sum((found.answers[key].passes for key in keys), Passes())
    return float(found.pipeline.price(passes, parameters).total)


def _to_paper(
    pipeline: Pipeline, cost: float, size: int, parameters: Parameters | None
) -> float | None:
    # Without caches the scorer would run as often; where it is priced at all, it is on both sides.
    decoder = pipeline.price(Passes(decoder=size, scorer=size), parameters).total
    encoder = pipeline.price(Passes(encoder=size, encoder_bytes=size), parameters).total
    baseline = decoder + PAPER_PASSES * encoder
    return cost / baseline if baseline else None


def _samples(found: Answered, keys: Sequence[str]) -> bool:
    return any(found.questions[key].temperature > 0 for key in keys)


def _endings(answer: Answer) -> list[tuple[bytes, str]]:
    return list(zip(answer.outputs, answer.stopped, strict=True))


def _same(pairs: Sequence[tuple[Answer, Answer]]) -> int:
    """Outputs that are the reference's, and ended as they did."""
    both = (zip(_endings(a), _endings(b), strict=True) for a, b in pairs)
    return sum(ours == theirs for each in both for ours, theirs in each)


def _near_ties(found: Answered, reference: Answered, keys: Sequence[str]) -> int:
    """Outputs that part from the reference's at a near-tie."""
    model, ties = found.pipeline.model, 0
    for key in keys:
        question = found.questions[key]
        sampling = Sampling(temperature=question.temperature, top_p=question.top_p)
        ends = zip(_endings(found.answers[key]), _endings(reference.answers[key]), strict=True)
        for sample, (ours, theirs) in enumerate(ends):
            if ours != theirs:
                got, want = (_ids(model, *each) for each in (ours, theirs))
                seed = seed_of_sample(question.seed, sample)
                ties += explain(model, question.prompt, want, got, sampling, seed).near_tie
    return ties


def _ids(model: Model, output: bytes, stopped: str) -> list[int]:
    ended = [model.scheme.eos] if stopped == "eos" else []
    return [*model.scheme.encode(output), *ended]


def _agreement(pairs: Sequence[tuple[Answer, Answer]]) -> float | None:
    texts = [both for a, b in pairs for both in zip(a.outputs, b.outputs, strict=True)]
    same = sum(x == y for ours, theirs in texts for x, y in zip(ours, theirs, strict=False))
    size = sum(len(theirs) for _, theirs in texts)
    return same / size if size else None
