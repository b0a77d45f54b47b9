"""What tasks promise."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from blt_core.errors import DataError
from blt_core.evaluation.figures import Figure
from blt_core.evaluation.protocol import Answer, Likelihoods, Part, Passage, Question
from blt_core.evaluation.sandbox import Sandbox
from blt_core.testing.contracts import Broken, Contracts, NotPromised, require, reseed
from blt_core.testing.elsewhere import require_same
from blt_core.testing.subject import Subject
from blt_core.types import Passes, RoundCounts

TASK = Contracts("task")


@attrs.frozen(eq=False)
class Parrot:
    """A model that answers by a function of the question: what a task makes of it is its own.

    asked: keys of the questions, in order; prompts: their prompts. scored: texts, in order.
    """

    seed: int = 0
    context_bytes: int = 4096
    asked: list[str] = attrs.field(factory=list)
    prompts: list[bytes] = attrs.field(factory=list)
    scored: list[bytes] = attrs.field(factory=list)

    def generate(self, questions: Sequence[Question]) -> list[Answer]:
        """The end of each prompt, turned around, or some letters."""
        answers = []
        for question in questions:
            if len(question.prompt) + question.max_new_bytes > self.context_bytes:
                raise Broken(f"question {question.key!r} does not fit the context", "task.fits")
            self.asked.append(question.key)
            self.prompts.append(question.prompt)
            output = bytes(reversed(question.prompt[-20:])) or b"abc"
            output = output[: question.max_new_bytes]
            answers.append(
                Answer(
                    (output,) * question.samples,
                    ("length",) * question.samples,
                    Passes(len(output), 1, 1, 1),
                    0,
                    0,
                    RoundCounts(),
                    0.01,
                )
            )
        return answers

    def score(self, passages: Sequence[Passage]) -> list[Likelihoods]:
        """Some log-probability, which depends on the text alone."""
        found = []
        for passage in passages:
            self.prompts.append(passage.prompt)
            self.scored.append(passage.text)
            digest = hashlib.sha256(passage.prompt + b"\0" + passage.text).digest()[0]
            nats = -(1 + digest / 256) * max(len(passage.text), 1)
            found.append(Likelihoods(nats, -1.0, greedy=digest < 128, truncated=False))  # noqa: PLR2004
        return found

    def judge(self, what: str, found: Mapping[str, Callable[[], Any]]) -> list[Any]:
        """Each is called."""
        return [each() for each in found.values()]

    def sandbox(self, seconds: float) -> Sandbox:
        """None: nothing that a model wrote runs here."""
        raise DataError("the kit runs no programs that a model wrote")


def _run(subject: Subject, limit: int | None = 4, seed: int = 0) -> tuple[Parrot, Sequence[Part]]:
    task, model = subject.build(), Parrot(seed)
    if getattr(task, "executes", False):
        raise NotPromised("it runs programs that a model writes, which the kit does not")
    parts = task.run(model, limit)
    if not isinstance(parts, Sequence) or not parts:
        raise Broken(f"run gave {parts!r}; expected parts", "task.parts")
    return model, parts


@TASK.add("asks", "`asks` is 'text' or 'likelihood', and what it asks is that.")
def _asks(subject: Subject, _: None) -> None:
    asks = subject.build().asks
    require(asks in ("text", "likelihood"), f"asks = {asks!r}; expected 'text' or 'likelihood'")
    model, _parts = _run(subject)
    if asks == "likelihood":
        require(not model.asked, "it says that it asks for likelihoods, and has text generated")
    else:
        require(model.asked, "it says that it asks for text, and has none generated")


@TASK.add(
    "parts",
    "`run` gives parts with names of their own, how many items each has, and figures that are "
    "numbers.",
)
def _parts(subject: Subject, _: None) -> None:
    _model, parts = _run(subject)
    for part in parts:
        if not isinstance(part, Part):
            raise Broken(f"run gave {part!r} among its parts")
        require(part.items > 0, f"part {part.name!r} has {part.items} items")
        require(part.figures, f"part {part.name!r} has no figures")
        for name, figure in part.figures.items():
            if not isinstance(figure, Figure) or not math.isfinite(figure.value):
                raise Broken(
                    f"the figure {name!r} of part {part.name!r} is {figure!r}; expected a finite "
                    "Figure, as blt_core.evaluation.figures has them (mean, ratio)"
                )
    names = [part.name for part in parts]
    require(len(set(names)) == len(names), f"two parts have one name: {names}")


@TASK.add(
    "keys",
    "Each question has a key of its own; parts name keys of questions that were asked.",
)
def _keys(subject: Subject, _: None) -> None:
    model, parts = _run(subject)
    twice = {key for key in model.asked if model.asked.count(key) > 1}
    require(not twice, f"several questions have the key {sorted(twice)[:1]}")
    strange = {key for part in parts for key in part.keys} - set(model.asked)
    require(not strange, f"parts name keys of no question: {sorted(strange)[:3]}")


@TASK.add(
    "deterministic",
    "With the same answers it asks the same and gives the same scores, in any global random state "
    "and in any process.",
)
def _deterministic(subject: Subject, _: None) -> None:
    found = []
    for number in range(2):
        reseed(number)
        found.append(told(subject))
    require(found[0] == found[1], "asks or scores otherwise in another global random state")
    require_same(subject, f"{__name__}:told")


def told(subject: Subject) -> dict[str, str]:
    """What it asks, and how it scores, each as a text."""
    model, parts = _run(subject, seed=3)
    scores = {f"{p.name} {n}": f.value for p in parts for n, f in p.figures.items()}
    return {
        "what it asks": repr((model.asked, model.prompts, model.scored)),
        "how it scores": repr(sorted(scores.items())),
    }


@TASK.add("limit", "With `limit` each part has at most so many items.")
def _limit(subject: Subject, _: None) -> None:
    _model, parts = _run(subject, limit=2)
    for part in parts:
        require(part.items <= 2, f"part {part.name!r} has {part.items} items of 2")  # noqa: PLR2004


@TASK.add("fits", "A prompt and what it asks for fit into the model's context.")
def _fits(subject: Subject, _: None) -> None:
    _run(subject)
