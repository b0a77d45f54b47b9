"""Training that starts from a checkpoint."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from blt_core.errors import ConfigError, RunError
from blt_core.pipeline import Pipeline
from blt_core.plugins.loading import load_plugins
from blt_core.wiring.config import Config
from blt_plugins.training.run.job import Job
from blt_plugins.training.run.make_job import make_job
from blt_plugins.training.run.trainer import Trainer
from tests.training.runs import assert_same_run, metrics, sends, stored, tensors_of


@pytest.fixture
def further(finished, tables, tmp_path) -> Callable[..., Job]:
    """Makes a job that goes on from the model of a finished run; keys go into its decoder table."""
    first = finished("first")
    kept = {k: v for k, v in tables.items() if k in {"schema", "corpus", "train"}}
    kept["train"] = {k: v for k, v in kept["train"].items() if k != "scorer"}

    def make(out: str = "out", **changes: Any) -> Job:
        run = {"checkpoint": str(first)}
        config = Config.from_mapping({**kept, "run": run} | changes, "more.toml")
        return make_job(config, load_plugins(), out=tmp_path / out)

    return make


def test_training_goes_on_from_a_checkpoint(silent, further):
    job = further()
    _, model = stored(job.out.parent / "first/model")
    assert all(torch.equal(t, model[name]) for name, t in tensors_of(job).items())
    result = Trainer(job, silent()).run()
    after = tensors_of(job)
    changed = {name for name, t in after.items() if not torch.equal(t, model[name])}
    assert changed == {name for name in after if not name.startswith("patcher.")}
    assert result.threshold == further().model.patcher.threshold > 0
    assert {row["phase"] for row in metrics(job.out)} == {"model"}


def test_training_from_a_checkpoint_teaches_its_decoder_to_denoise(silent, further):
    blocks = {"use": "block-diffusion", "block_bytes": 4, "stale_share": 0.25}
    with pytest.raises(ConfigError, match="trained without blocks"):
        further(objective=blocks)
    job = further(objective=blocks, decoder={"denoises": True})
    Trainer(job, silent()).run()
    assert stored(job.out / "model")[0]["decoder"]["denoises"] is True
    # What was trained stays so: a run cannot claim otherwise.
    config = {"schema": 1, "run": {"checkpoint": str(job.out / "model")}}
    with pytest.raises(ConfigError, match=r"decoder\.denoises: comes from the checkpoint"):
        Pipeline.from_config({**config, "decoder": {"denoises": False}})


def test_a_run_from_a_checkpoint_is_resumed_where_it_was_stopped(silent, further):
    whole = further("whole")
    Trainer(whole, silent()).run()

    with pytest.raises(RunError, match="interrupted at model step 7"):
        Trainer(further("stopped"), silent(sends("model", 7, signal.SIGTERM))).run()
    again = further("stopped")
    Trainer(again, silent()).run()
    assert_same_run(whole, again)


def test_a_run_from_a_checkpoint_scores_the_scorer_that_it_stores(silent, further):
    job = further(train={"steps": 2, "save_dtype": "bfloat16", "valid_bytes": 300})
    Trainer(job, silent()).run()
    _, model = stored(job.out / "model")
    ours = tensors_of(job)
    names = [name for name in ours if name.startswith("patcher.")]
    assert names
    assert all(torch.equal(ours[name], model[name].float()) for name in names)


@pytest.mark.parametrize("name", ["model", "model-last"])
def test_training_does_not_write_over_the_checkpoint_it_starts_from(further, tmp_path, name):
    first = tmp_path / "first"
    if name != "model":
        shutil.copytree(first / "model", first / name)
    with pytest.raises(ConfigError, match=r"run\.checkpoint: training would write over it"):
        further("first", run={"checkpoint": str(first / name)})


def test_what_a_checkpoint_gives_cannot_be_trained_or_given_again(further):
    with pytest.raises(ConfigError) as caught:
        further(train={"steps": 3, "scorer": {"steps": 2}})
    assert "train.scorer: the scorer and its threshold come from" in str(caught.value)
    with pytest.raises(ConfigError, match=r"decoder\.layers: comes from the checkpoint"):
        further(decoder={"layers": 4})
