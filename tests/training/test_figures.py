"""What an objective gives is a loss with figures that the log can hold, or an error says why."""

from __future__ import annotations

import json
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from blt_core.errors import PluginError, RunError
from blt_core.protocols import RESERVED_FIGURES, RESERVED_PREFIXES
from blt_core.storage.tensors import model_config, model_tensors
from blt_plugins.training.data.load import load_data
from blt_plugins.training.run.trainer import Trainer
from blt_plugins.training.scores.calibration import calibrate
from blt_plugins.training.scores.held_out import HeldOut

LABEL = "objective 'ar' (blt-core)"


@attrs.define
class Changed:
    """An objective whose outcome is changed by a function of (loss, call from 1)."""

    inner: Any
    change: Any
    calls: int = 0

    def loss(self, *arguments):
        self.calls += 1
        return self.change(self.inner.loss(*arguments)[0], self.calls)


def train(new_job, silent, change, **settings):
    job = new_job(**{"steps": 2, "scorer": {"steps": 0}, **settings})
    job = attrs.evolve(job, objective=Changed(job.objective, change))
    return job, Trainer(job, silent())


@pytest.mark.parametrize(
    "name", [*RESERVED_FIGURES, *(f"{prefix}x" for prefix in RESERVED_PREFIXES)]
)
def test_a_figure_with_a_name_of_the_run_s_own_is_refused(new_job, silent, name):
    _, trainer = train(new_job, silent, lambda loss, _: (loss, {name: 123.0, "mine": 1.0}))
    with pytest.raises(PluginError) as caught:
        trainer.run()
    text = str(caught.value)
    assert text.startswith(f"{LABEL}: a figure named '{name}' would stand for the run's own")
    assert all(reserved in text for reserved in (*RESERVED_FIGURES, *RESERVED_PREFIXES))


def test_every_name_that_a_run_writes_is_reserved(new_job, silent, tables):
    tables["objective"] = {"use": "block-diffusion", "block_bytes": 4, "share": 0.5}
    tables["decoder"]["denoises"] = True
    job = new_job(steps=2, validate_every=2, valid_drafts=2)
    Trainer(job, silent()).run()
    lines = (job.out / "metrics.jsonl").read_text().splitlines()
    written = {name for line in lines for name in json.loads(line)}
    of_objective = {"clean_loss", "mask_loss", "stale_loss"}
    assert of_objective < written
    for name in written - of_objective:
        assert name in RESERVED_FIGURES or name.startswith(RESERVED_PREFIXES), name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda loss, _: loss, "its loss is a tensor of shape () and torch.float32"),
        (lambda loss, _: [loss, {}], "its loss is a list"),
        (lambda loss, _: (loss.expand(3), {}), "its loss has the shape (3,): it is not reduced"),
        (lambda loss, _: (float(loss.detach()), {}), "its loss is 5."),
        (lambda loss, _: (loss.detach(), {}), "its loss depends on no parameter"),
        (lambda loss, _: (loss.long(), {}), "its loss is a tensor of shape () and torch.int64"),
        (lambda loss, _: (loss, None), "its figures are None"),
        (lambda loss, _: (loss, {3: 1.0}), "its figures are a dict"),
        (lambda loss, _: (loss, {"x": "1"}), "its figure 'x' is '1'"),
        (lambda loss, _: (loss, {"x": torch.ones(2)}), "its figure 'x' is a tensor of shape (2,)"),
    ],
)
def test_what_is_no_loss_with_figures_is_refused_with_the_contract(new_job, silent, change, text):
    _, trainer = train(new_job, silent, change)
    with pytest.raises(PluginError) as caught:
        trainer.run()
    assert str(caught.value).startswith(f"{LABEL}: {text}")
    assert "expected: loss() returns (loss, figures)" in str(caught.value)


def test_figures_must_be_the_same_in_all_passes_of_a_step(new_job, silent):
    change = lambda loss, call: (loss, {"odd" if call % 2 else "even": 1.0})  # noqa: E731
    _, trainer = train(new_job, silent, change, accumulate=2)
    with pytest.raises(PluginError, match="differ between the passes of a step: even, loss and"):
        trainer.run()


@pytest.mark.parametrize(
    "value", [torch.tensor(2.5), torch.tensor([2.5], requires_grad=True), np.float32(2.5), 2.5]
)
def test_figures_of_one_number_are_logged_as_numbers(new_job, silent, value):
    job, trainer = train(new_job, silent, lambda loss, _: (loss, {"x": value}))
    trainer.run()
    records = [json.loads(line) for line in (job.out / "metrics.jsonl").read_text().splitlines()]
    assert [record["x"] for record in records if "x" in record] == [2.5, 2.5]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_leaves_the_log_valid_json(new_job, silent, value):
    job, trainer = train(new_job, silent, lambda loss, _: (loss, {"x_loss": value}), plot=True)
    trainer.run()  # the plot of the losses leaves it out

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    lines = (job.out / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [record["x_loss"] for record in records if "x_loss" in record] == [None, None]


def test_a_loss_that_is_no_number_before_any_step_is_not_blamed_on_the_learning_rate(
    new_job, silent
):
    nothing = lambda loss, call: (loss * float("nan") if call >= first else loss, {})  # noqa: E731
    first = 1
    _, trainer = train(new_job, silent, nothing)
    with pytest.raises(RunError, match="model step 1: the loss is nan") as caught:
        trainer.run()
    assert "the learning rate has no part in it: look at " + LABEL in str(caught.value)
    assert "lower the learning rate" not in str(caught.value)
    first = 2
    _, trainer = train(new_job, silent, nothing, out="later")
    with pytest.raises(RunError, match="model step 2: the loss is nan") as caught:
        trainer.run()
    assert "fix: lower the learning rate" in str(caught.value)
    assert LABEL in str(caught.value)


# -- scores that are no numbers --------------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch):
    """Makes the held-out scores of a model those of a list, one after another."""

    def give(*scores: float) -> None:
        left = list(scores)
        monkeypatch.setattr(
            "blt_plugins.training.scores.validation.evaluate_model",
            lambda *_: HeldOut(left.pop(0), 1, 0.5, 4.0),
        )

    return give


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("first", [NAN, INF])
def test_a_score_that_is_no_number_is_never_the_best(new_job, silent, scored, first):
    scored(first, 3.0, NAN, 2.0, -INF)
    job, report = new_job(steps=5, validate_every=1, scorer={"steps": 0}), silent()
    result = Trainer(job, report).run()
    assert result.best_bits_per_byte == 2.0
    best = [note.split(":")[0] for note in report.notes if "the best so far" in note]
    assert best == ["model step 2", "model step 4"]
    assert (job.out / "model-last" / "config.toml").exists()


def test_a_run_without_any_score_that_is_a_number_fails_and_keeps_its_last_model(
    new_job, silent, scored
):
    scored(NAN, INF)
    job = new_job(steps=2, validate_every=1, scorer={"steps": 0})
    for _ in range(2):  # again when it is found finished
        with pytest.raises(RunError, match=r"model: not written, since no held-out score was a"):
            Trainer(job, silent()).run()
        job = new_job(steps=2, validate_every=1, scorer={"steps": 0})
    assert not (job.out / "model").exists()
    assert (job.out / "model-last" / "config.toml").exists()


def test_a_best_score_that_an_older_version_stored_is_not_believed(new_job, silent, scored):
    def stop(phase, step):
        if step == 2:
            raise KeyboardInterrupt

    settings = {"steps": 4, "validate_every": 1, "checkpoint_every": 1, "scorer": {"steps": 0}}
    scored(2.5, 2.0, 3.0)
    trainer = Trainer(new_job(**settings), silent(stop))
    trainer._judge.best = NAN
    trainer._judge._score_model = lambda *_: None
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert Trainer(new_job(**settings), silent()).run().best_bits_per_byte == 2.0


def test_a_scorer_whose_score_is_no_number_stops_the_run(new_job, silent, monkeypatch):
    monkeypatch.setattr(
        "blt_plugins.training.run.judge.evaluate_scorer", lambda *_: HeldOut(NAN, 1, 0.5)
    )
    with pytest.raises(RunError, match="scorer step 6: the held-out score is nan"):
        Trainer(new_job(), silent()).run()


def test_a_scorer_whose_entropies_are_no_numbers_is_not_calibrated(new_job):
    job = new_job()
    torch.nn.init.constant_(job.model.patcher.byte_scorer.head.weight, NAN)
    batches = load_data(job.corpus, job.settings, job.model).calibration
    with pytest.raises(RunError, match="entropies are no finite numbers"):
        calibrate(job.model.patcher, batches, 4.0)


def test_evaluate_refuses_a_score_that_is_no_number(blt, new_job, silent, tmp_path, texts):
    job = new_job(steps=1, scorer={"steps": 0})
    Trainer(job, silent()).run()
    torch.nn.init.constant_(job.model.decoder.norm.weight, NAN)
    job.format.write(job.out / "model", model_config(job.model), model_tensors(job.model))
    done = blt("evaluate", job.out / "model", texts, "--rounds", 0, "--json")
    assert (done.code, done.out) == (1, "")
    assert "the held-out score is nan bits per byte" in done.err
