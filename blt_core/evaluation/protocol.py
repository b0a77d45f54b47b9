"""The contract of the kind ``task``, and what passes between a task and the model that it asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import attrs

from blt_core.evaluation.figures import Figure
from blt_core.evaluation.sandbox import Sandbox
from blt_core.types import Passes, RoundCounts

#: What JSON can spell.
Json = Any


@attrs.frozen
class Question:
    """A prompt to continue.

    key: a name that no other question of the task has, the same in each run. stop: texts that end
    the output, which keeps them. samples: texts wanted. temperature, top_p: 0 is greedy. seed: of
    the draws; with it each text can be made again. truncated: whether the prompt was cut to fit.
    """

    key: str
    prompt: bytes
    max_new_bytes: int
    stop: tuple[bytes, ...] = ()
    samples: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0
    truncated: bool = False


@attrs.frozen
class Answer:
    """What a model wrote: an output for each sample, and what all of them cost.

    stopped: why each ended ("length", "eos", "stop"). seconds: this question's share of its
    batch's time, the reading of the prompt included. error: why there is none; then outputs are
    empty, and stopped says "error".
    """

    outputs: tuple[bytes, ...]
    stopped: tuple[str, ...]
    passes: Passes
    drafted: int
    accepted: int
    counts: RoundCounts
    seconds: float
    error: str | None = None

    @classmethod
    def failed(cls, question: Question, error: str) -> Answer:
        """That of a question that cannot be answered."""
        count = question.samples
        nothing, why = (b"",) * count, ("error",) * count
        return cls(nothing, why, Passes(), 0, 0, RoundCounts(), 0.0, error)

    @property
    def texts(self) -> list[str]:
        """The outputs as UTF-8, with U+FFFD for what is none."""
        return [output.decode("utf-8", errors="replace") for output in self.outputs]


@attrs.frozen
class Passage:
    """A text whose likelihood is asked for, after a prompt that is read and not scored."""

    prompt: bytes
    text: bytes


@attrs.frozen
class Likelihoods:
    """Of a passage, in nats. logprob: of its bytes; eos: of EOS after them.

    greedy: whether each byte is the likeliest in its place. truncated: whether the prompt was cut.
    """

    logprob: float
    eos: float
    greedy: bool
    truncated: bool


@runtime_checkable
class Asked(Protocol):
    """The model that a task asks. What it has answered is kept, so a run can go on.

    context_bytes: what prompt and output may have together. seed: of whatever is drawn at random.
    """

    context_bytes: int
    seed: int

    def generate(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers, in order; RequestError where no question can be answered.

        One that cannot be, beside others, has an empty answer with ``error``.
        """
        ...

    def score(self, passages: Sequence[Passage]) -> list[Likelihoods]:
        """The likelihoods, in order; texts longer than the context are scored in windows."""
        ...

    def judge(self, what: str, found: Mapping[str, Callable[[], Json]]) -> list[Json]:
        """What each function gives, in order, kept under its key: each is called but once.

        what: in a word, for whoever watches.
        """
        ...

    def sandbox(self, seconds: float) -> Sandbox:
        """Where programs that a model has written run for so long at most.

        Raises DataError unless the user allows it, and the system can isolate them.
        """
        ...


@attrs.frozen
class Part:
    """A part of a task that is reported by itself.

    name: what it is called below the task, "" for all of it. keys: of its questions, whose costs
    are summed. items: how many it has. figures: its scores by name. told: further facts.
    """

    name: str
    items: int
    figures: Mapping[str, Figure]
    keys: tuple[str, ...] = ()
    told: Mapping[str, object] = attrs.field(factory=dict)


@runtime_checkable
class Task(Protocol):
    """Questions with a way to score the answers.

    asks: "text" where it generates, so that it is run with each sampler; "likelihood" where it only
    scores given texts, which depends on no sampler, so that it is run once. executes (optional):
    whether it runs programs that the model writes, which is checked before any work.
    """

    asks: Literal["text", "likelihood"]

    def run(self, model: Asked, limit: int | None) -> Sequence[Part]:
        """Ask ``model`` whatever is wanted, and score what it answers.

        With the same answers it gives the same parts in the same order; what it draws at random
        depends on ``model.seed`` alone. limit: at most so many items of each part, as evenly spaced
        as can be (None: all). Raises DataError for data that is missing or malformed.
        """
        ...
