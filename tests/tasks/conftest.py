from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from blt_core.evaluation.protocol import Answer, Likelihoods
from blt_core.evaluation.sandbox import make_sandbox
from blt_core.pipeline import Pipeline
from blt_core.types import Passes, RoundCounts
from tests.cli.conftest import blt, checkpoint  # noqa: F401 -- fixtures
from tests.nightly import NIGHTLY


@pytest.fixture
def pipeline(checkpoint) -> Pipeline:  # noqa: F811
    run = {"checkpoint": str(checkpoint), "dtype": "float64"}
    return Pipeline.from_config({"schema": 1, "run": run})


@pytest.fixture
def write(tmp_path):
    """Write records as JSON Lines; gives the path."""

    def call(name: str, records) -> object:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return call


@pytest.fixture
def _piqa_alone(tmp_path, monkeypatch):
    """Of the harness's own tasks one: it reads thousands of files to find all, in a nightly run."""
    from lm_eval.tasks import manager

    from blt_plugins.tasks import harness

    if not NIGHTLY:
        own = Path(manager.__file__).parent
        shutil.copytree(own / "piqa", tmp_path / "own" / "piqa")
        monkeypatch.setattr(manager, "__file__", str(tmp_path / "own" / "manager.py"))
    harness._all_tasks.cache_clear()
    yield
    harness._all_tasks.cache_clear()


class Scripted:
    """A model that answers as it is told, by prompt; fulfils the protocol Asked."""

    context_bytes = 1 << 20
    seed = 0

    def __init__(self, answers, *, allow=True) -> None:
        self._answers, self._allow = answers, allow
        self.questions: list = []

    def generate(self, questions):
        self.questions += questions
        found = []
        for question in questions:
            outputs = self._answers(question)
            outputs = (outputs,) if isinstance(outputs, bytes) else tuple(outputs)
            stopped = ("stop",) * len(outputs)
            found.append(Answer(outputs, stopped, Passes(1, 1, 1), 0, 0, RoundCounts(), 1.0))
        return found

    def score(self, passages):
        return [Likelihoods(-float(len(each.text)), -1.0, False, False) for each in passages]

    def judge(self, what, found):
        return [make() for make in found.values()]

    def sandbox(self, seconds):
        return make_sandbox(allowed=self._allow, unsafe=False, seconds=seconds)


@pytest.fixture
def scripted():
    return Scripted
