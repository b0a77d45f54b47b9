"""Tasks of lm-evaluation-harness, through a model that answers its three kinds of requests.

:class:`ByteModel` is an ``LM`` of the harness; it serves programs that call the harness themselves:

>>> import lm_eval                                                          # doctest: +SKIP
>>> from blt_plugins.tasks.harness import ByteModel                         # doctest: +SKIP
>>> lm_eval.simple_evaluate(ByteModel.of("demo:python"), tasks=["piqa"])    # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from blt_core.errors import DataError
from blt_core.evaluation.asking import Asker, Silent
from blt_core.evaluation.data import as_bytes, fitted
from blt_core.evaluation.figures import Figure, Given, Resampled, mean, ratio
from blt_core.evaluation.options import RunOptions
from blt_core.evaluation.protocol import Asked, Part, Passage, Question
from blt_core.evaluation.store import Store
from blt_core.pipeline import Pipeline
from blt_core.types import seed_of_prompt, seed_of_sample

#: Bytes that stand for one token, in limits that a task gives in tokens.
BYTES_PER_TOKEN = 4
#: New tokens where a task sets no limit: the harness's own default.
NEW_TOKENS = 256
#: The harness's own seed of examples, and of numpy.
_SEED = 1234
_NUMBER = (int, float, np.number)
#: What lm-eval calls an unfiltered response.
_PLAIN = "none"


class ByteModel(LM):  # type: ignore[misc]
    """A model of bytes, as the harness asks one.

    Contexts stand before continuations byte for byte (a tokenizer's rules for spaces between them
    have nothing to do here); without a context, BOS does. EOS is no part of a likelihood. Limits in
    tokens count BYTES_PER_TOKEN bytes each, at most half of the model's context; contexts are cut
    from the left to what fits. truncated, asked: how many were cut, and how many there were.
    keys: of the questions of each task.
    """

    def __init__(self, model: Asked, bytes_per_token: int = BYTES_PER_TOKEN) -> None:
        super().__init__()
        self._model, self._bytes_per_token = model, bytes_per_token
        self.truncated: dict[str, int] = {}
        self.asked: dict[str, int] = {}
        self.keys: dict[str, list[str]] = {}
        self._calls = 0

    @classmethod
    def of(cls, source: str, sampler: str = "ar", *, batch: int = 16, seed: int = 0) -> ByteModel:
        """The model of a checkpoint, ``demo:NAME`` or a config file, which generates by a sampler.

        batch: texts that run together. seed: of sampled texts.
        """
        if source.endswith(".toml"):
            pipeline = Pipeline.from_toml(source)
        else:
            pipeline = Pipeline.from_config({"schema": 1, "run": {"checkpoint": source}})
        pipeline = pipeline.with_sampler(sampler)
        options = RunOptions(batch=batch, seed=seed)
        return cls(Asker(pipeline, Store(None, {}), options, Silent()))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether it is what greedy decoding would write) of each."""
        passages = [Passage(*(as_bytes(text) for text in each.args[:2])) for each in requests]
        found = self._model.score(passages)
        for request, each in zip(requests, found, strict=True):
            self._note(request, cut=each.truncated)
        return [(each.logprob, each.greedy) for each in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-probability of each whole text, in windows as held-out scores read it."""
        found = self._model.score([Passage(b"", as_bytes(each.args[0])) for each in requests])
        for request in requests:
            self._note(request, cut=False)
        return [each.logprob for each in found]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What is written after each context, up to the first of its ``until``."""
        self._calls += 1
        seen: dict[tuple[Any, ...], int] = {}
        questions = []
        for request in requests:
            name = (request.task_name, request.doc_id, request.idx)
            seen[name] = seen.get(name, -1) + 1  # one request stands there once for each repeat
            questions.append(self._question(request, seen[name]))
            self._note(request, cut=questions[-1].truncated)
            self.keys.setdefault(str(request.task_name), []).append(questions[-1].key)
        answers = self._model.generate(questions)
        return [
            _before(answer.texts[0], [stop.decode() for stop in question.stop])
            for question, answer in zip(questions, answers, strict=True)
        ]

    def _question(self, request: Instance, repeat: int) -> Question:
        context, settings = request.args
        until = settings.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        tokens = settings.get("max_gen_toks") or settings.get("max_new_tokens") or NEW_TOKENS
        room = max(self._model.context_bytes // 2, 1)
        most = min(int(tokens) * self._bytes_per_token, room)
        sampled = settings.get("do_sample", bool(settings.get("temperature")))
        temperature = float(settings.get("temperature") or 1.0) if sampled else 0.0
        prompt = as_bytes(context)
        kept = fitted(prompt, self._model.context_bytes - most)
        own = seed_of_prompt(self._model.seed, int(request.doc_id or 0))
        name = f"{request.task_name}/{request.doc_id}/{request.idx}"
        return Question(
            key=f"{self._calls}/{name}/{repeat}",
            prompt=kept,
            max_new_bytes=most,
            stop=tuple(stop.encode() for stop in stops if stop),
            temperature=temperature,
            top_p=settings.get("top_p"),
            seed=seed_of_sample(own, repeat),
            truncated=len(kept) < len(prompt),
        )

    def _note(self, request: Instance, *, cut: bool) -> None:
        name = str(request.task_name)
        self.asked[name] = self.asked.get(name, 0) + 1
        self.truncated[name] = self.truncated.get(name, 0) + cut


def _before(text: str, stops: Iterable[str]) -> str:
    """The text up to the first of some stops."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


class HarnessTasks:
    """The tasks that a name stands for: one, those of a group, or those of a tag."""

    def __init__(
        self, name: str, include: str | None, shots: int | None, bytes_per_token: int
    ) -> None:
        if include is not None and not Path(include).is_dir():
            raise DataError(f"include: there is no folder {include}")
        self._name, self._shots, self._bytes_per_token = name, shots, bytes_per_token
        with _seeded():
            self._found = _load(name, include)
        for each, task in self._found["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise DataError(
                    f"lm-eval's task {each!r} runs what the model writes, without a sandbox\n"
                    "  fix: take the task humaneval or mbpp"
                )
            if getattr(task, "MULTIMODAL", False):
                raise DataError(
                    f"lm-eval's task {each!r} shows pictures; a model of bytes reads text"
                )

    @property
    def generates(self) -> bool:
        """Whether any of them asks for text."""
        return any(t.OUTPUT_TYPE == "generate_until" for t in self._found["tasks"].values())

    def run(self, model: Asked, limit: int | None) -> list[Part]:
        """Ask what all of them ask; the first ``limit`` items of each."""
        tasks = self._found["tasks"]
        for task in tasks.values():
            task.set_fewshot_seed(seed=_SEED)
            # As the harness has it: a task that says 0 means it.
            if self._shots is not None and task.config.num_fewshot != 0:
                task.set_config(key="num_fewshot", value=self._shots)
            # Requests of an earlier run, with another sampler, have their answers in them.
            task._instances = None  # noqa: SLF001 -- there is no other way to ask anew
        asked = ByteModel(model, self._bytes_per_token)
        with _seeded():
            result = evaluate(
                asked,
                self._found,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                verbosity="ERROR",
            )
        if result is None:
            raise DataError(f"lm-eval gave no results of {self._name!r}")
        figures = {name: _figures(task, result["samples"][name]) for name, task in tasks.items()}
        counts = {
            name: len({sample["doc_id"] for sample in result["samples"][name]}) for name in tasks
        }
        parts = [self._part(name, figures[name], [name], asked, counts[name]) for name in tasks]
        for name, found in result["results"].items():
            if name not in tasks:
                leaves = [leaf for leaf in tasks if leaf in _leaves(self._found, name)]
                items = sum(counts[leaf] for leaf in leaves)
                own = [(counts[leaf], figures[leaf]) for leaf in leaves]
                parts.append(self._part(name, _group_figures(found, own), leaves, asked, items))
        return parts

    def _part(
        self,
        name: str,
        figures: Mapping[str, Figure],
        leaves: Sequence[str],
        asked: ByteModel,
        items: int,
    ) -> Part:
        count = sum(asked.asked.get(leaf, 0) for leaf in leaves)
        cut = sum(asked.truncated.get(leaf, 0) for leaf in leaves)
        tasks = [self._found["tasks"][leaf] for leaf in leaves]
        told: dict[str, object] = {
            "shots": tasks[0].config.num_fewshot or 0 if tasks else 0,
            "truncated_share": cut / count if count else 0.0,
        }
        if self.generates:
            told["bytes_per_token"] = self._bytes_per_token
        return Part(
            name="" if name == self._name else name,
            items=items,
            figures=figures,
            keys=tuple(key for leaf in leaves for key in asked.keys.get(leaf, ())),
            told=told,
        )


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The global random numbers that the harness sets before it runs, for tasks that use them."""
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(0)
    np.random.seed(_SEED)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002


def _load(name: str, include: str | None) -> Any:
    """The tasks of a name; DataError where there are none, or their data cannot be had."""
    if include is not None:
        # The harness takes seconds to find its own tasks: not where they are not meant.
        own = TaskManager(include_path=include, include_defaults=False)
        if name in own.all_tasks:
            with contextlib.suppress(Exception):  # it may build on a task of the harness
                return own.load([name])
    manager = _all_tasks(include)
    if name not in manager.all_tasks:
        raise DataError(
            f"lm-eval has no task, group or tag named {name!r}\n"
            "  list all: lm-eval ls tasks; your own: include=FOLDER with its YAML"
        )
    try:
        return manager.load([name])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"lm-eval cannot load the task {name!r}: {reason}\n"
            "  fix: its data comes from the Hugging Face hub; fetch it where there is a network"
        ) from error


@functools.cache
def _all_tasks(include: str | None) -> TaskManager:
    return TaskManager(include_path=include)


def _leaves(found: Mapping[str, Any], group: str) -> set[str]:
    """The tasks below a group, at any depth."""
    below: set[str] = set()
    for child in found.get("group_map", {}).get(group, ()):
        below |= {child} if child in found["tasks"] else _leaves(found, child)
    return below


def _figures(task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """The metrics of a task, each from its values for all items."""
    figures: dict[str, Figure] = {}
    aggregations = task.aggregation()
    for sample in samples[:1] and {s["filter"]: s for s in samples}.values():
        for metric in sample["metrics"]:
            values = [s[metric] for s in samples if s["filter"] == sample["filter"] and metric in s]
            name = metric if sample["filter"] == _PLAIN else f"{metric},{sample['filter']}"
            figures[name] = _figure(values, aggregations.get(metric))
    return figures


def _figure(values: Sequence[Any], aggregation: Callable[[Sequence[Any]], float] | None) -> Figure:
    """A metric from its values: of sums, where it is known to be a function of them."""
    plain = all(isinstance(value, _NUMBER) for value in values)
    candidates: list[Figure] = [mean([float(value) for value in values])] if plain else []
    if values and all(_are_two_numbers(value) for value in values):
        nats, sizes = zip(*values, strict=True)
        candidates += [
            ratio(nats, sizes, -1 / np.log(2)),  # bits per byte
            Exponential(ratio(nats, sizes, -1.0)),  # perplexity
        ]
    if aggregation is None:
        return candidates[0] if candidates else Given(float("nan"))
    value: Any = aggregation(values)
    if not isinstance(value, _NUMBER):
        return Given(float("nan"))
    value = float(value)
    for each in candidates:
        if np.isclose(each.value, value, rtol=1e-12, equal_nan=True):
            return each
    return Resampled(tuple(values), aggregation)


def _are_two_numbers(value: object) -> bool:
    two = isinstance(value, tuple) and len(value) == 2  # noqa: PLR2004
    return two and all(isinstance(each, _NUMBER) for each in value)  # type: ignore[attr-defined]


class Exponential:
    """exp of another figure."""

    def __init__(self, of: Figure) -> None:
        self._of = of

    @property
    def value(self) -> float:
        """Of all items."""
        return float(np.exp(self._of.value))

    def draws(self, seed: int) -> Any:
        """Of resamples."""
        draws = self._of.draws(seed)
        return None if draws is None else np.exp(draws)


class Averaged:
    """A weighted mean of figures of items that are not the same ones."""

    def __init__(self, weights: Sequence[float], figures: Sequence[Figure]) -> None:
        self._weights, self._figures = np.array(weights) / sum(weights), figures

    @property
    def value(self) -> float:
        """Of all items."""
        return float(self._weights @ [figure.value for figure in self._figures])

    def draws(self, seed: int) -> Any:
        """Of resamples of the items of each figure, apart from those of the others."""
        drawn = [each.draws(seed + 1 + number) for number, each in enumerate(self._figures)]
        found = [draws for draws in drawn if draws is not None]
        if len(found) < len(drawn):
            return None
        fewest = min(map(len, found))
        return self._weights @ np.stack([draws[:fewest] for draws in found])


def _group_figures(
    found: Mapping[str, Any], leaves: Sequence[tuple[int, Mapping[str, Figure]]]
) -> dict[str, Figure]:
    """The metrics of a group as the harness gives them.

    leaves: how many items each task has, and its figures. Where a metric is their mean, by items or
    by tasks, its interval is that of the mean.
    """
    figures: dict[str, Figure] = {}
    for key, value in found.items():
        metric, comma, rule = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            name = metric if rule == _PLAIN else key
            figures[name] = _of_leaves(name, float(value), leaves)
    return figures


def _of_leaves(
    name: str, value: float, leaves: Sequence[tuple[int, Mapping[str, Figure]]]
) -> Figure:
    own = [(count, figures[name]) for count, figures in leaves if count and name in figures]
    if own:
        for weights in ([count for count, _ in own], [1] * len(own)):
            mean_of_all = Averaged(weights, [figure for _, figure in own])
            if np.isclose(mean_of_all.value, value, rtol=1e-9):
                return mean_of_all
    return Given(value)
