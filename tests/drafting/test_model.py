"""Draft models: what they propose, what they count for, and what is refused."""

from __future__ import annotations

import copy

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_core import ConfigError, Pipeline
from blt_core.component import BuildContext
from blt_core.decoding.engine import Request
from blt_core.decoding.state import DecodeState
from blt_core.errors import RunError
from blt_core.types import Draws, Parameters, Passes, Sampling
from blt_plugins.cost.bandwidth import Bandwidth, BandwidthParams
from blt_plugins.drafting.model import ModelDrafter, ModelParams
from tests.engine import models
from tests.engine.drafters import Recorded
from tests.engine.runs import ar_alone, model_drafter, run, speculative
from tests.engine.strategies import batches, examples, model_indices, samplings
from tests.tiny import config


@examples(30)
@given(st.data(), model_indices, st.integers(1, 6), st.one_of(st.just(Sampling()), samplings))
def test_a_model_that_drafts_for_itself_is_always_right(data, index, count, sampling):
    batch = data.draw(batches(index, sampling=sampling, stops=False))
    drafter = Recorded(model_drafter(index, index, count))
    for request, done in zip(batch, run(models.model(index), speculative(drafter), batch, sampling),
                             strict=True):  # fmt: skip
        alone = ar_alone(index, request, sampling)
        assert (done.ids, done.stop_reason) == (alone.ids, alone.stop_reason)
        if done.stop_reason == "length":
            assert done.accepted == done.drafted
        assert (
            done.passes.draft
            == sum(done.counts.accepted[j] * j for j in range(len(done.counts.accepted)))
            or alone.stop_reason == "eos"
        )


@pytest.mark.parametrize("index", [1, 2, 4, 5])
def test_it_reads_long_texts_through_its_windows(index):
    assert models.shape(index).decoder_window is not None
    model = models.model(index)
    short = attrs.evolve(model, patcher=models.model(2).patcher)  # other patches than the main's
    context = BuildContext(model.scheme, lambda _: short)
    drafter = Recorded(ModelDrafter(ModelParams(checkpoint="x", draft_bytes=5), context))
    request = Request(b"some text to begin with ", 260)
    [done] = run(model, speculative(drafter), [request], Sampling(1.2))
    assert done.ids == ar_alone(index, request, Sampling(1.2)).ids
    text = [model.scheme.bos, *model.scheme.encode(request.prompt)]
    at = len(text) + 1
    for draft in drafter.drafts:
        [ids] = draft
        given = [*text, *done.ids][:at]
        fresh = DecodeState(short, [given[1:]], [9])
        for token in ids:
            logits = fresh.next_logits([1])[:, 0]
            [want] = Sampling(1.2).pick(logits, [len(given)], [True], Draws((0,)))
            assert token == want
            fresh.append([[token]])
            given.append(token)
        stood = next((i for i, t in enumerate(ids) if i + at >= len(text) + len(done.ids) or
                      t != [*text, *done.ids][at + i]), len(ids))  # fmt: skip
        at += stood + 1


@pytest.mark.parametrize("rows", [(1, 1), (1, 0), (0, 1)])
def test_its_passes_are_counted_for_whom_they_ran_with_the_parameters_that_they_read(rows):
    model, other = models.model(0), models.model(4)
    state = DecodeState(model, [list(b"the text"), list(b"other")], [9, 9])
    state.next_logits([1, 1])
    before = [state.passes(row) for row in (0, 1)]
    drafter = model_drafter(0, 4, 3)
    drafter.draft(state, [3 * on for on in rows], Sampling(), Draws((0, 0)))
    alone = DecodeState(other, [list(b"the text"), list(b"other")], [9, 9])
    for _ in range(3):
        logits = alone.next_logits(list(rows))
        alone.append([[int(logits[row, 0].argmax())] if on else [] for row, on in enumerate(rows)])
    each = other.parameter_counts()
    for row, on in enumerate(rows):
        ran = alone.passes(row)
        read = (
            ran.decoder * each.decoder
            + ran.encoder_bytes * each.encoder
            + ran.encoder * each.global_model
        )
        assert ran.decoder == 3 * on
        assert state.passes(row) == before[row] + Passes(draft=3 * on, draft_parameters=read)
    assert state.calls.draft == 3


def test_the_price_has_a_line_of_its_own_which_is_in_the_total():
    cost = Bandwidth(BandwidthParams(), BuildContext()).cost(
        Passes(decoder=10, draft=5, draft_parameters=7_000_000), Parameters(1_000_000, 0, 0)
    )
    assert cost.lines["draft_model"] == pytest.approx(0.014)
    assert cost.gigabytes == pytest.approx(0.034)


def test_it_proposes_nothing_beyond_its_own_context():
    short = attrs.evolve(models.model(0), context_bytes=12)
    context = BuildContext(short.scheme, lambda _: short)
    drafter = Recorded(ModelDrafter(ModelParams(checkpoint="x", draft_bytes=8), context))
    request = Request(b"12345678", 14)
    [done] = run(models.model(0), speculative(drafter), [request])
    assert done.ids == ar_alone(0, request).ids
    # Positions 9 to 12 are within it; the first byte is the model's own.
    assert sum(len(ids) for [ids] in drafter.drafts) <= 3
    assert drafter.drafts[0] != [[]]
    assert drafter.drafts[-1] == [[]]


def test_other_ids_are_refused(tmp_path):
    other = attrs.evolve(models.model(0).scheme, byte_offset=3)
    context = BuildContext(other, lambda _: models.model(0))
    with pytest.raises(
        ValueError,
        match="byte_offset = 0 instead of 3",
    ):
        ModelDrafter(ModelParams(checkpoint="other"), context)


def test_a_checkpoint_that_is_not_there_is_named():
    tables = config(
        sampler={"use": "speculative", "drafter": {"use": "model", "checkpoint": "x/y"}}
    )
    with pytest.raises(ConfigError, match="drafter 'model' cannot be built: x/y: no checkpoint"):
        Pipeline.from_config(tables)


def test_it_is_in_the_device_and_dtype_of_the_run():
    spec = "speculative drafter.use=model drafter.checkpoint='demo:python' drafter.draft_bytes=2"
    run_table = {"checkpoint": "demo:python", "dtype": "float64"}
    pipeline = Pipeline.from_config({"schema": 1, "run": run_table}).with_sampler(spec)
    found = pipeline.sampler.drafter.model
    assert {p.dtype for p in found.decoder.parameters()} == {torch.float64}
    result = pipeline.generate("def f", max_new_bytes=9, temperature=0.7)
    assert (
        result.ids
        == pipeline.with_sampler("ar").generate("def f", max_new_bytes=9, temperature=0.7).ids
    )
    assert result.accepted == result.drafted
    assert result.to_dict()["n_draft"] == result.drafted


def test_a_damaged_draft_model_is_named():
    torch.manual_seed(0)
    broken = attrs.evolve(models.model(0), decoder=copy.deepcopy(models.model(0).decoder))
    for parameter in broken.decoder.parameters():
        parameter.fill_(float("nan"))
    context = BuildContext(broken.scheme, lambda _: broken)
    drafter = ModelDrafter(ModelParams(checkpoint="runs/small"), context)
    with pytest.raises(RunError, match="draft model runs/small: the model's logits are no numbers"):
        run(models.model(0), speculative(drafter), [Request(b"ab", 5)])
