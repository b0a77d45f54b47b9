"""What breaks its contract gets an error; it never gives wrong bytes, and never hangs."""

from __future__ import annotations

import attrs
import pytest
import torch

from blt_core.engine import Request, decode
from blt_core.errors import EngineError, PluginError, RunError
from blt_core.types import Draft, Round, Sampling
from tests.engine import models
from tests.engine.runs import ar, run, speculative

REQUEST = [Request(b"ab", 6), Request(b"", 3)]


@attrs.frozen
class Scripted:
    """A sampler that appends ``ids`` to each row and reports ``report``."""

    ids: list[int]
    report: object

    def check(self, sampling):
        pass

    def round(self, ops, sampling, draws):
        ops.append([self.ids for _ in ops.lengths])
        return self.report


def round_of(*ids: int, rows: int = 2) -> Round:
    return Round([list(ids)] * rows, [0] * rows, [0] * rows)


@pytest.mark.parametrize(
    ("ids", "report", "message"),
    [
        ([], round_of(), "committed nothing"),
        ([66], round_of(65), r"says that it committed \[65\].*the text has \[66\]"),
        ([256], round_of(256), "committed id 256.*which is never output"),
        ([65, 258], round_of(65, 258), "committed id 258"),
        ([65], None, "not a Round of 2 batch rows"),
        ([65], round_of(65, rows=1), "not a Round of 2 batch rows"),
        ([9999], round_of(9999), "not all ids below 259"),
        ([-1], round_of(-1), "not all ids below 259"),
    ],
)
def test_a_sampler_that_does_not_say_what_it_did(ids, report, message):
    with pytest.raises(EngineError, match=message):
        list(decode(models.model(0), Scripted(ids, report), REQUEST, Sampling()))


@attrs.frozen
class Drafts:
    draft_: object

    def draft(self, ops, limit, sampling, draws):
        return self.draft_


@pytest.mark.parametrize(
    ("draft", "error"),
    [
        (None, PluginError),
        (Draft([[1]]), PluginError),
        (Draft([[9999], [1]]), EngineError),
        (Draft([[-1], [1]]), EngineError),
    ],
)
def test_a_drafter_that_proposes_no_draft(draft, error):
    with pytest.raises(error):
        run(models.model(0), speculative(Drafts(draft)), REQUEST)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_weights_stop_the_run(temperature):
    shared = models.model(0)
    head = shared.decoder.head.weight
    kept = head.detach().clone()
    try:
        with torch.no_grad():
            head[5] = float("nan")
        with pytest.raises(RunError, match="weights are damaged"):
            run(shared, ar(), REQUEST, Sampling(temperature))
    finally:
        with torch.no_grad():
            head.copy_(kept)


def test_a_tiny_temperature_is_greedy_and_no_overflow():
    logits = torch.tensor([[1.0, 3.0, 2.0, float("-inf")]])
    probs = Sampling(1e-310).probabilities(logits)
    assert probs.tolist() == [[0.0, 1.0, 0.0, 0.0]]
