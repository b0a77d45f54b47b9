"""What breaks its contract gets an error; it never gives wrong bytes, and never hangs."""

from __future__ import annotations

import attrs
import pytest
import torch

from blt_core.decoding.engine import Request, decode
from blt_core.errors import ComponentError, EngineError, RunError
from blt_core.types import Draft, Round, Sampling
from blt_plugins.drafting.cascade import CascadeDrafter, CascadeParams
from blt_plugins.sampling.diffusion import BlockDiffusion, BlockDiffusionParams
from blt_plugins.sampling.speculative import Speculative, SpeculativeParams
from tests.engine import models
from tests.engine.runs import ar, run, self_drafter, speculative

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
        ([65], Round(None, [0, 0], [0, 0]), "not a Round of 2 batch rows"),
        ([65], Round([[65], None], [0, 0], [0, 0]), "not a Round of 2 batch rows"),
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


def cascade(drafter):
    return CascadeDrafter(CascadeParams(draft_bytes=4, drafter=drafter), models.CONTEXT)


def diffusion(unmasking):
    params = BlockDiffusionParams(block_bytes=4, unmasking=unmasking)
    return BlockDiffusion(params, models.CONTEXT)


@pytest.mark.parametrize(
    ("draft", "error"),
    [
        (None, "expected a Draft of 2 batch rows"),
        ([[1], [1]], "expected a Draft of 2 batch rows"),
        (Draft([[1]]), "expected lists of ids for 2 batch rows"),
        (Draft(["ab", "c"]), "expected lists of ids"),
        (Draft([[1.0], [1]]), "expected lists of ids"),
        (Draft([[9999], [1]]), "these are not all ids below 259"),
        (Draft([[-1], [1]]), "not all ids below 259"),
    ],
)
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "in a cascade"])
def test_a_drafter_that_proposes_no_draft_is_named_wherever_it_is(draft, error, nested):
    drafter = cascade(Drafts(draft)) if nested else Drafts(draft)
    with pytest.raises(ComponentError, match=rf"^Drafts proposed .*{error}"):
        run(models.model(0), speculative(drafter), [Request(b"ab", 6), Request(b"", 6)])


@attrs.frozen
class Accepts:
    decision: object

    def check(self, sampling):
        pass

    def accept(self, draft, logits_brV, positions, active, sampling, draws):
        return self.decision


@pytest.mark.parametrize(
    "decision",
    [
        None,
        ([0], [65]),
        ([0, 0], [65]),
        ([9, 0], [65, 65]),
        ([-1, 0], [65, 65]),
        ([0.5, 0], [1, 1]),
    ],
)
def test_a_verification_that_decides_nothing_is_named(decision):
    params = SpeculativeParams(drafter=self_drafter(2), verification=Accepts(decision))
    sampler = Speculative(params, models.CONTEXT)
    with pytest.raises(ComponentError, match=r"^Accepts accepted"):
        run(models.model(0), sampler, REQUEST)


@pytest.mark.parametrize(
    ("drafted", "accepted"), [(1, 2), (0, -1), (1, float("nan")), (1, 0.5), (True, True)]
)
def test_counts_of_a_round_that_cannot_be(drafted, accepted):
    report = Round([[65], [65]], [drafted, 0], [accepted, 0])
    with pytest.raises(
        EngineError, match=r"^Scripted: .*expected integers, 0 <= accepted <= draft"
    ):
        list(decode(models.model(0), Scripted([65], report), REQUEST, Sampling()))


def test_only_a_first_round_reads_the_prompt():
    report = Round([[65], [65]], [0, 0], [0, 0], prefill=True)
    with pytest.raises(EngineError, match="Scripted: prefill = True: only a first round"):
        list(decode(models.model(0), Scripted([65], report), REQUEST, Sampling()))


@attrs.frozen
class Selects:
    choose: object

    def select(self, probs_bBV, masked_bB, starts, draws):
        return self.choose(masked_bB)


def written_in_place(masked_bB):
    chosen = masked_bB.clone()
    masked_bB[:] = False
    return chosen


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (torch.zeros_like, "fills no byte of a block that has masks"),
        (lambda masked: masked.int(), r"torch.int32 of shape \(2, 4\); expected torch.bool"),
        (lambda masked: masked[:, 0], r"torch.bool of shape \(2,\); expected .* \(2, 4\)"),
        (lambda masked: masked.tolist(), "expected a bool tensor"),
        (lambda _: None, "selected None; expected a bool tensor"),
    ],
)
def test_a_rule_that_selects_no_places_is_named(choose, message):
    with pytest.raises(ComponentError, match=f"^Selects .*{message}"):
        run(models.model(0), diffusion(Selects(choose)), REQUEST)


def test_a_rule_may_write_to_the_mask_that_it_is_given():
    plain, written = (
        [progress.output for progress in run(models.model(0), diffusion(Selects(rule)), REQUEST)]
        for rule in (lambda masked: masked, written_in_place)
    )
    assert written == plain


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
