"""A task: sums of two numbers, after two that are solved.

Change ``Sums.run``. Each question has a key of its own, the same in each run; with the same answers
the task gives the same scores; ``limit`` bounds the items.

Try it:    blt plugins test task acme/name
Contracts: docs/kinds/task.md
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import attrs

from blt_core import BuildContext, Component, at_least, hookimpl
from blt_core.evaluation.figures import mean
from blt_core.evaluation.protocol import Answer, Asked, Part, Question

EXAMPLES = b"2 + 3 = 5\n4 + 5 = 9\n"

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class SumsParams:
    """largest: of the numbers that are added."""

    largest: int = attrs.field(default=9, validator=at_least(1))


class Sums:
    """The share of sums that a model gets right."""

    #: "text": it is run with each sampler. "likelihood": it only scores texts, and is run once.
    asks: Literal["text", "likelihood"] = "text"

    def __init__(self, params: SumsParams, context: BuildContext) -> None:
        self.largest = params.largest

    def run(self, model: Asked, limit: int | None) -> Sequence[Part]:
        """Ask for each sum, and score the answers."""
        numbers = range(1, self.largest + 1)
        pairs = [(one, other) for one in numbers for other in numbers]
        step = max(-(-len(pairs) // limit), 1) if limit else 1  # evenly spaced
        pairs = pairs[::step]
        answers = model.generate([_question(one, other) for one, other in pairs])
        right = [
            float(_is(answer, one + other))
            for answer, (one, other) in zip(answers, pairs, strict=True)
        ]
        keys = tuple(_question(one, other).key for one, other in pairs)
        return [Part("", len(pairs), {"right": mean(right)}, keys)]


def _question(one: int, other: int) -> Question:
    prompt = EXAMPLES + b"%d + %d = " % (one, other)
    return Question(f"{one}+{other}", prompt, max_new_bytes=6, stop=(b"\n",))


def _is(answer: Answer, number: int) -> bool:
    return answer.texts[0].split("\n")[0].strip() == str(number)


@hookimpl
def blt_components() -> list[Component]:
    """The task."""
    return [Component("task", NAME, Sums, SumsParams, "sums of two numbers")]
