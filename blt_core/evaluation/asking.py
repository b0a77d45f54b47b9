"""Asking a model: batches that depend on the questions alone, whose answers are kept."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from blt_core.errors import DataError
from blt_core.evaluation.options import RunOptions
from blt_core.evaluation.protocol import Answer, Json, Likelihoods, Passage, Question
from blt_core.evaluation.sandbox import Sandbox, make_sandbox
from blt_core.evaluation.store import Store, from_record, to_record
from blt_core.pipeline import Generation, Pipeline
from blt_core.requests import RequestSettings

if TYPE_CHECKING:
    from collections.abc import Callable

#: Passages that are scored, and stored, together.
SCORED = 64
#: New bytes of the run that is not timed.
WARM_UP_BYTES = 4


class Watch(Protocol):
    """Who is told how far work has come."""

    def begin(self, what: str, total: int) -> Callable[[int], None]:
        """Work on ``total`` items begins; call the result with how many more are done."""
        ...


class Silent:
    """Tells nobody."""

    def begin(self, what: str, total: int) -> Callable[[int], None]:
        """Nothing."""
        return lambda _done: None


class Asker:
    """A pipeline that a task asks; fulfils :class:`blt_core.evaluation.protocol.Asked`.

    Batches hold prompts of similar length, and are the same whatever was answered before: a batch
    that a kill cut short is asked again whole, so that no figure depends on the kill. questions,
    answers: all that were asked so far, by key. title: what whoever watches is told.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        store: Store,
        options: RunOptions,
        watch: Watch,
        title: str = "",
    ) -> None:
        self._pipeline, self._store, self._options = _plain(pipeline), store, options
        self._watch, self._title = watch, title
        self.seed = options.seed
        self.context_bytes = pipeline.model.context_bytes
        self._is_warm = False
        self.questions: dict[str, Question] = {}
        self.answers: dict[str, Answer] = {}

    def generate(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers, in order; see :class:`blt_core.evaluation.protocol.Asked`."""
        keys = [question.key for question in questions]
        if len(set(keys)) < len(keys) or any(self._is_other(each) for each in questions):
            raise DataError("two questions of a task have the same key")
        batches = list(_batches(questions, self._options.batch))
        for batch in batches:
            self._check(batch)
        done = self._watch.begin(self._title, len(questions))
        for batch in batches:
            names = [_name_of(each) for each in batch]
            if not all(self._store.get(name) for name in names):
                self.warm_up(batch[0])
                answers = zip(names, self._ask(batch), strict=True)
                self._store.put([to_record(name, answer) for name, answer in answers])
            for question, name in zip(batch, names, strict=True):
                self.answers[question.key] = from_record(self._store.get(name))
            done(len(batch))
        self.questions |= {question.key: question for question in questions}
        return [self.answers[key] for key in keys]

    def score(self, passages: Sequence[Passage]) -> list[Likelihoods]:
        """The likelihoods, in order; see :class:`blt_core.evaluation.protocol.Asked`."""
        keys = [_key_of(passage) for passage in passages]
        wanted = dict(zip(keys, passages, strict=True))
        longest = sorted(wanted, key=lambda key: -len(wanted[key].prompt + wanted[key].text))
        done = self._watch.begin(self._title, len(wanted))
        for start in range(0, len(longest), SCORED):
            group = longest[start : start + SCORED]
            if not all(self._store.get(key) for key in group):
                self._store.put(self._scored(group, wanted))
            done(len(group))
        found = {key: self._store.get(key) for key in wanted}
        return [
            Likelihoods(*(found[key][name] for name in ("logprob", "eos", "greedy", "truncated")))
            for key in keys
        ]

    def judge(self, what: str, found: Mapping[str, Callable[[], Json]]) -> list[Json]:
        """What each function gives; see :class:`blt_core.evaluation.protocol.Asked`."""
        done = self._watch.begin(f"{self._title}, {what}", len(found))
        results = []
        for key, make in found.items():
            name = f"{what}/{key}"
            if self._store.get(name) is None:
                self._store.put([{"key": name, "value": make()}])
            results.append(self._store.get(name)["value"])
            done(1)
        return results

    def sandbox(self, seconds: float) -> Sandbox:
        """Where programs run; see :class:`blt_core.evaluation.protocol.Asked`."""
        return make_sandbox(
            allowed=self._options.allow_code, unsafe=self._options.unsafe, seconds=seconds
        )

    def time(self, questions: Sequence[Question]) -> float:
        """Bytes a second of questions asked one by one, the reading of prompts included."""
        self.warm_up(questions[0])
        began, size = time.perf_counter(), 0
        for question in questions:
            [answer] = self._ask([question])
            size += sum(map(len, answer.outputs))
        return size / (time.perf_counter() - began)

    def warm_up(self, question: Question) -> None:
        """What a machine does once, such as finding kernels, in a short run that is not timed."""
        if not self._is_warm:
            self._is_warm = True
            short = attrs.evolve(question, max_new_bytes=min(question.max_new_bytes, WARM_UP_BYTES))
            self._pipeline.generate([short.prompt], **_request([short]))

    def _is_other(self, question: Question) -> bool:
        return self.questions.get(question.key, question) != question

    def _check(self, batch: Sequence[Question]) -> None:
        self._pipeline.check([each.prompt for each in batch], **_request(batch))

    def _ask(self, batch: Sequence[Question]) -> list[Answer]:
        began = time.perf_counter()
        found = self._pipeline.generate([each.prompt for each in batch], **_request(batch))
        seconds = (time.perf_counter() - began) / len(batch)
        each = batch[0].samples
        return [
            _answer(found[first : first + each], seconds)
            for first in range(0, each * len(batch), each)
        ]

    def _scored(self, keys: Sequence[str], wanted: Mapping[str, Passage]) -> list[dict[str, Any]]:
        passages = [wanted[key] for key in keys]
        scores = self._pipeline.score(
            [passage.text for passage in passages],
            prompts=[passage.prompt for passage in passages],
            top=1,
        )
        return [
            {
                "key": key,
                "logprob": sum(each.logprob for each in score.likelihoods),
                "eos": score.eos.logprob,
                "greedy": all(each.top[0][0] == each.id for each in score.likelihoods),
                "truncated": len(passage.prompt)
                > max(self.context_bytes - len(passage.text) - 1, 0),
            }
            for key, passage, score in zip(keys, passages, scores, strict=True)
        ]


def _plain(pipeline: Pipeline) -> Pipeline:
    """The same without the request settings of ``[run]``: a question says all that is asked."""
    other = copy.copy(pipeline)
    run = attrs.evolve(pipeline.settings, top_k=None, top_p=None)
    other.plan = attrs.evolve(pipeline.plan, settings={**pipeline.plan.settings, "run": run})
    return other


def _batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Questions with the same settings and prompts of similar length, ``size`` texts at a time."""
    groups: dict[tuple[Any, ...], list[Question]] = {}
    for each in questions:
        settings = (each.max_new_bytes, each.stop, each.samples, each.temperature, each.top_p)
        groups.setdefault(settings, []).append(each)
    for group in groups.values():
        ordered = sorted(group, key=lambda question: len(question.prompt))
        step = max(size // group[0].samples, 1)
        for start in range(0, len(ordered), step):
            yield ordered[start : start + step]


def _request(batch: Sequence[Question]) -> RequestSettings:
    first = batch[0]
    return {
        "max_new_bytes": first.max_new_bytes,
        "stop": list(first.stop),
        "samples": first.samples,
        "temperature": first.temperature,
        "top_k": None,
        "top_p": first.top_p,
        "seed": [question.seed for question in batch],
    }


def _answer(samples: Sequence[Generation], seconds: float) -> Answer:
    first, *others = samples
    passes, counts = first.passes, first.counts
    for each in others:
        passes, counts = passes + each.passes, counts + each.counts
    return Answer(
        outputs=tuple(each.output for each in samples),
        stopped=tuple(str(each.stop_reason) for each in samples),
        passes=passes,
        drafted=sum(each.drafted for each in samples),
        accepted=sum(each.accepted for each in samples),
        counts=counts,
        seconds=seconds,
    )


def _name_of(question: Question) -> str:
    """What an answer is kept under: the key, and a digest of all that was asked."""
    asked = repr(attrs.astuple(question)).encode()
    return f"{question.key}@{hashlib.blake2b(asked, digest_size=8).hexdigest()}"


def _key_of(passage: Passage) -> str:
    name = hashlib.blake2b(digest_size=16)
    for text in (passage.prompt, passage.text):
        name.update(len(text).to_bytes(8, "big") + text)
    return name.hexdigest()
