"""A pipeline that answers batches of questions, here or in the worker of an executor."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

from blt_core.errors import EngineError, RequestError, RunError
from blt_core.evaluation.protocol import Answer, Passage, Question
from blt_core.execution import AtHand, Tell, check_torch
from blt_core.pipeline import Generation, Pipeline
from blt_core.requests import RequestSettings
from blt_core.wiring.config import Config

#: New bytes of the run that is not timed.
WARM_UP_BYTES = 4

#: The table of a sampler, what is to be done ("ask" or "score"), and a batch for it.
Task = tuple[Mapping[str, Any], str, Sequence[Any]]


class Answering:
    """What depends on a pipeline alone: whoever asks for a batch gets the same."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = _plain(pipeline)
        self._is_warm = False

    @property
    def sampler(self) -> dict[str, Any]:
        """The table of its sampler."""
        return self._pipeline.plan.node("sampler").describe()

    def do(self, how: str, batch: Sequence[Any]) -> list[Any]:
        """``ask`` a batch of questions, or ``score`` one of passages."""
        return self.score(batch) if how == "score" else self._answers(batch)

    def _answers(self, batch: Sequence[Question]) -> list[Answer]:
        """The answers; where a batch fails, its questions are tried alone."""
        try:
            self.warm_up(batch[0])
            return self.ask(batch)
        except (RequestError, EngineError, RunError) as error:
            if len(batch) > 1:
                return [answer for each in batch for answer in self._answers([each])]
            return [Answer.failed(batch[0], str(error))]

    def error(self, question: Question) -> RequestError | None:
        """Why a question cannot be served, if that is so."""
        try:
            self._pipeline.check([question.prompt], **_request([question]))
        except RequestError as error:
            return error
        return None

    def ask(self, batch: Sequence[Question]) -> list[Answer]:
        """The answers to questions with the same settings."""
        began = time.perf_counter()
        found = self._pipeline.generate([each.prompt for each in batch], **_request(batch))
        seconds = (time.perf_counter() - began) / len(batch)
        each = batch[0].samples
        return [
            _answer(found[first : first + each], seconds)
            for first in range(0, each * len(batch), each)
        ]

    def score(self, passages: Sequence[Passage]) -> list[dict[str, Any]]:
        """A record of likelihoods for each passage, as they are kept."""
        scores = self._pipeline.score(
            [passage.text for passage in passages],
            prompts=[passage.prompt for passage in passages],
            top=1,
        )
        context = self._pipeline.model.context_bytes
        return [
            {
                "logprob": sum(each.logprob for each in score.likelihoods),
                "eos": score.eos.logprob,
                "greedy": all(each.top[0][0] == each.id for each in score.likelihoods),
                "truncated": len(passage.prompt) > max(context - len(passage.text) - 1, 0),
            }
            for passage, score in zip(passages, scores, strict=True)
        ]

    def time(self, questions: Sequence[Question]) -> float:
        """Bytes a second of questions asked one by one, the reading of prompts included."""
        self.warm_up(questions[0])
        began, size = time.perf_counter(), 0
        for question in questions:
            [answer] = self.ask([question])
            size += sum(map(len, answer.outputs))
        return size / (time.perf_counter() - began)

    def warm_up(self, question: Question) -> None:
        """What a machine does once, such as finding kernels, in a short run that is not timed."""
        if not self._is_warm:
            short = attrs.evolve(question, max_new_bytes=min(question.max_new_bytes, WARM_UP_BYTES))
            self._pipeline.generate([short.prompt], **_request([short]))
            self._is_warm = True


@attrs.frozen
class Begin:
    """Makes what a worker does with a :data:`Task`: it answers with any sampler.

    digest: of the weights, and kernels: their digest; a worker with others refuses to work.
    """

    at_hand: AtHand[Pipeline]
    config: Config
    digest: str
    kernels: str | None
    version: str = torch.__version__

    def __call__(self, tell: Tell) -> AnsweringWithAny:
        """A pipeline of the worker's own, or that of this process."""
        check_torch(self.version)
        pipeline = self.at_hand.value
        if pipeline is None:
            pipeline = Pipeline.load(self.config)
        if pipeline.model.digest() != self.digest:
            raise RunError(
                f"a worker finds other weights at {self.config.checkpoint} than the process that "
                "it works for\n  fix: give all machines the same files"
            )
        if pipeline.model.kernels != self.kernels:
            raise RunError(
                "a worker has other kernels than the process that it works for\n"
                "  fix: give all machines the same packages, or set BLT_KERNELS=fixed"
            )
        return AnsweringWithAny(pipeline)


class AnsweringWithAny:
    """A pipeline that answers with the sampler that a task names."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._found: dict[str, Answering] = {}

    def __call__(self, task: Task) -> list[Any]:
        """What came of a batch."""
        sampler, how, batch = task
        name = json.dumps(sampler, sort_keys=True)
        if name not in self._found:
            self._found[name] = Answering(self._pipeline.with_sampler(sampler))
        return self._found[name].do(how, batch)


def _plain(pipeline: Pipeline) -> Pipeline:
    """The same without the request settings of ``[run]``: a question says all that is asked."""
    other = copy.copy(pipeline)
    run = attrs.evolve(pipeline.settings, top_k=None, top_p=None)
    other.plan = attrs.evolve(pipeline.plan, settings={**pipeline.plan.settings, "run": run})
    return other


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
