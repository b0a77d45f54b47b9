"""Which model is the best, what is no number, and what scores tell."""

from __future__ import annotations

import math
import struct
from typing import Any

import attrs
import pytest
import torch

from blt_core.errors import DataError, RunError
from blt_core.pipeline import Pipeline
from blt_plugins.training.backends.torch import TorchBackend
from blt_plugins.training.data.load import load_data
from blt_plugins.training.run.folder import RunFolder
from blt_plugins.training.run.judge import of_first
from blt_plugins.training.run.phases import make_phases
from blt_plugins.training.run.trainer import Trainer
from tests.training.runs import BLOCKS, Scaled, metrics, model_scores, tensors_of


def test_the_best_model_is_kept_and_a_worse_last_one_written_beside_it(new_job, silent):
    job = new_job(steps=12, validate_every=4)
    job = attrs.evolve(job, objective=Scaled(job.objective, -1.0, since=7))
    result = Trainer(job, silent()).run()
    scores = model_scores(job.out)
    assert min(scores) < scores[2], "the last score follows steps up the hill"
    assert result.best_bits_per_byte == min(scores)
    assert result.held_out.bits_per_byte == scores[2]
    assert [r["calls"] for r in metrics(job.out) if "calls" in r] == list(range(1, 13))
    config = {"schema": 1, "run": {"checkpoint": str(job.out / "model-last")}}
    last = tensors_of(Pipeline.from_config(config))
    assert all(torch.equal(last[name], tensor) for name, tensor in tensors_of(job).items())


def test_a_run_that_is_killed_after_its_last_step_has_written_all(new_job, silent, monkeypatch):
    def stop(self, phase, step, backend, **state):
        if (phase.name, step) == ("model", 12):
            raise KeyboardInterrupt
        save(self, phase, step, backend, **state)

    save = RunFolder.save
    monkeypatch.setattr(RunFolder, "save", stop)
    job = new_job(steps=12, validate_every=4)
    job = attrs.evolve(job, objective=Scaled(job.objective, -1.0, since=7))
    with pytest.raises(KeyboardInterrupt):
        Trainer(job, silent()).run()
    assert (job.out / "model-last" / "config.toml").exists()


def test_without_held_out_text_the_last_model_is_written_and_nothing_is_gathered(
    new_job, silent, tables, monkeypatch
):
    tables["corpus"]["valid_percent"] = 0
    with pytest.raises(DataError, match=r"holds no document out; .* train.valid_bytes = 0"):
        Trainer(new_job(), silent())
    monkeypatch.setattr(TorchBackend, "whole", lambda _: pytest.fail("gathered"))
    job = new_job(valid_bytes=0)
    assert Trainer(job, silent()).run().best_bits_per_byte is None
    assert (job.out / "model" / "config.toml").exists()


class Third:
    """A process of seven, whose first one has something else."""

    rank, world_size = 2, 7

    def __init__(self, first: float) -> None:
        self.first = first

    def mean(self, values):
        assert set(values) == {0}
        return [half / 7 for half in struct.unpack("<2I", struct.pack("<d", self.first))]


@pytest.mark.parametrize("value", [0.1 + 0.2, -2.540958, 1e-308, 5e307, 0.0])
def test_what_process_0_has_found_is_in_all_to_the_last_bit(value):
    assert of_first(Third(value), 0.5) == value


@attrs.define
class Spoilt:
    """An objective whose gradient is no number in call ``since``, though the loss is one."""

    inner: Any
    since: int
    calls: int = 0

    def loss(self, *arguments):
        self.calls += 1
        loss, figures = self.inner.loss(*arguments)
        nothing = (loss - loss.detach()).sqrt()  # 0, and its gradient is infinite
        return (loss + 0 * nothing if self.calls == self.since else loss), figures


@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
def test_what_is_no_number_stops_the_run_and_names_what_is_good(new_job, silent, what):
    whole, undisturbed = new_job("whole", validate_every=4), silent()
    Trainer(whole, undisturbed).run()
    job = new_job(validate_every=4)
    inner, best = job.objective, job.out / "model"
    objective = Spoilt(inner, 7) if what == "gradient" else Scaled(inner, float(what), since=7)
    with pytest.raises(RunError) as caught:
        Trainer(attrs.evolve(job, objective=objective), silent()).run()
    found = "gradient norm is nan" if what == "gradient" else f"loss is {what}"
    text = str(caught.value).splitlines()[0]
    state = job.out / "state" / "model-00000005"
    assert text == (
        f"model step 7: the {found}; the last good state is {state}, the best model so far {best}"
    )
    assert state.is_dir()
    assert (best / "config.toml").exists()
    assert caught.value.exit_code == 1
    again, report = new_job(validate_every=4), silent()
    Trainer(again, report).run()  # the state before it is good
    assert next(iter(report.losses)) == ("model", 6)
    assert report.losses.items() <= undisturbed.losses.items()
    ours, theirs = tensors_of(again), tensors_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_before_the_first_score_no_model_is_called_good(new_job, silent):
    job = new_job()
    job = attrs.evolve(job, objective=Scaled(job.objective, float("nan"), since=2))
    with pytest.raises(RunError, match=r"the last good state is \S+/model-00000000\n"):
        Trainer(job, silent()).run()


@pytest.mark.parametrize("blocks", [False, True])
def test_what_follows_a_marker_is_trained_and_scored_alone(new_job, silent, tables, blocks):
    if blocks:
        tables |= {"objective": BLOCKS, "decoder": {**tables["decoder"], "denoises": True}}
    job = new_job(steps=2, validate_every=2, valid_drafts=0, score_after="(")
    result = Trainer(job, silent()).run()
    data = load_data(job.corpus, job.settings, job.model)
    nats, size = 0.0, 0
    for batch in data.valid:
        flags = job.model.patcher.flags(batch.rows, None)
        logits = job.model.forward(batch.rows, flags).clean.logits
        for row, length in enumerate(batch.rows.lengths):
            targets = batch.targets_br[row, :length]
            text = job.model.scheme.decode(targets.tolist())
            first = text.find(b"(") + 1
            first = first if first < length else 0
            scored = logits[row, first:length].log_softmax(-1)
            nats -= float(scored.detach().gather(1, targets[first:, None]).sum())
            size += len(text) - first
    assert size < sum(sum(batch.sizes) for batch in data.valid)
    assert result.held_out.bytes == size
    assert result.held_out.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    # What is not scored has no gradient: the loss is that of the scored targets alone.
    phase = make_phases(job.model, job.objective, job.settings, data.documents, data.windows)[-1]
    batch = phase.batches[0]
    cut = batch.after(job.settings.marker(job.model.scheme))
    assert not torch.equal(cut.targets_br, batch.targets_br)
    flags = job.model.patcher.flags(cut.rows, None)
    rngs = [torch.Generator().manual_seed(0) for _ in range(2)]
    alone = job.objective.loss(job.model, cut.rows, flags, cut.targets_br, rngs[0])
    assert torch.equal(phase.module(batch, rngs[1])[0], alone[0])


def test_scores_tell_of_masked_bytes_and_of_drafts(new_job, silent, tables):
    tables |= {"objective": BLOCKS, "decoder": {**tables["decoder"], "denoises": True}}
    job = new_job(steps=4, validate_every=4, valid_drafts=4)
    Trainer(job, silent()).run()
    (scores,) = (r for r in metrics(job.out) if r["phase"] == "model" and "bits_per_byte" in r)
    rates = [f"masked_accuracy/{rate}" for rate in (0.25, 0.5, 0.75, 1.0)]
    drafts = ["accepted/blt-s draft_bytes=16", "accepted/blt-dv block_bytes=4 start=aligned"]
    assert all(0 <= scores[name] <= 1 for name in (*rates, *drafts))
