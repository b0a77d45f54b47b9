"""What a task asks, in batches that depend on the questions alone, whose answers are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from blt_core.errors import DataError
from blt_core.evaluation.answering import Answering
from blt_core.evaluation.options import RunOptions
from blt_core.evaluation.protocol import Answer, Json, Likelihoods, Passage, Question
from blt_core.evaluation.sandbox import Sandbox, make_sandbox
from blt_core.evaluation.store import Store, from_record, to_record
from blt_core.faults import broken
from blt_core.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

#: Passages that are scored, and stored, together.
SCORED = 64


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
    that a kill cut short is asked again whole, so that no figure depends on the kill; so is one
    with a question that failed. questions,
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
        self._answering = Answering(pipeline)
        self._store, self._options = store, options
        self._watch, self._title = watch, title
        self.seed = options.seed
        self.context_bytes = pipeline.model.context_bytes
        self.questions: dict[str, Question] = {}
        self.answers: dict[str, Answer] = {}

    def generate(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers, in order; see :class:`blt_core.evaluation.protocol.Asked`."""
        keys = [question.key for question in questions]
        if len(set(keys)) < len(keys) or any(self._is_other(each) for each in questions):
            raise DataError("two questions of a task have the same key")
        wrong = self._wrong(questions)
        right = [question for question in questions if question.key not in wrong]
        batches = list(_batches(right, self._options.batch))
        done = self._watch.begin(self._title, len(questions))
        left = [batch for batch in batches if not self._has(map(_name_of, batch))]
        done(len(questions) - sum(map(len, left)))
        for asked, answers in self._answered("ask", left):
            found = zip(asked, answers, strict=True)
            self._store.put([to_record(_name_of(each), answer) for each, answer in found])
            done(len(asked))
        self.answers |= wrong
        for question in right:
            self.answers[question.key] = from_record(self._store.get(_name_of(question)))
        self.questions |= {question.key: question for question in questions}
        return [self.answers[key] for key in keys]

    def score(self, passages: Sequence[Passage]) -> list[Likelihoods]:
        """The likelihoods, in order; see :class:`blt_core.evaluation.protocol.Asked`."""
        keys = [_key_of(passage) for passage in passages]
        wanted = dict(zip(keys, passages, strict=True))
        longest = sorted(wanted, key=lambda key: -len(wanted[key].prompt + wanted[key].text))
        groups = [longest[start : start + SCORED] for start in range(0, len(longest), SCORED)]
        done = self._watch.begin(self._title, len(wanted))
        left = [[wanted[key] for key in group] for group in groups if not self._has(group)]
        done(len(wanted) - sum(map(len, left)))
        for group, records in self._answered("score", left):
            keyed = zip(group, records, strict=True)
            self._store.put([{"key": _key_of(each), **record} for each, record in keyed])
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
        """Bytes a second of questions asked one by one here, the reading of prompts included."""
        return self._answering.time(questions)

    def _wrong(self, questions: Sequence[Question]) -> dict[str, Answer]:
        """Those that cannot be served, by key; RequestError where that is so of all."""
        errors = {question.key: self._answering.error(question) for question in questions}
        found = {key: error for key, error in errors.items() if error is not None}
        if found and len(found) == len(questions):
            raise next(iter(found.values()))
        return {q.key: Answer.failed(q, str(found[q.key])) for q in questions if q.key in found}

    def _has(self, names: Iterable[str]) -> bool:
        """Whether all are there; what has failed is tried again in the next run."""
        kept = [self._store.get(name) for name in names]
        return all(record is not None and "error" not in record for record in kept)

    def _answered(
        self, how: str, batches: Sequence[Sequence[Any]]
    ) -> Iterator[tuple[Sequence[Any], Any]]:
        """Each batch with what came of it, as they are done."""
        workers = self._options.workers
        if workers is None:
            for batch in batches:
                yield batch, self._answering.do(how, batch)
        elif batches:
            sampler, missing = self._answering.sampler, set(range(len(batches)))
            for number, found in workers.run((sampler, how, batch) for batch in batches):
                missing.discard(number)
                yield batches[number], found
            if missing:
                text = f"gave no result of {len(missing)} tasks"
                raise broken(workers, text, "executor.results")

    def _is_other(self, question: Question) -> bool:
        return self.questions.get(question.key, question) != question


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


def _name_of(question: Question) -> str:
    """What an answer is kept under: the key, and a digest of all that was asked."""
    asked = repr(attrs.astuple(question)).encode()
    return f"{question.key}@{hashlib.blake2b(asked, digest_size=8).hexdigest()}"


def _key_of(passage: Passage) -> str:
    name = hashlib.blake2b(digest_size=16)
    for text in (passage.prompt, passage.text):
        name.update(len(text).to_bytes(8, "big") + text)
    return name.hexdigest()
