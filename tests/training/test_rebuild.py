"""What is stored is the model that was trained, or the run says what it would lose."""

from __future__ import annotations

import copy
import json
import re

import attrs
import pytest
import torch

from blt_core.errors import PluginError, RunError
from blt_core.pipeline import Pipeline
from blt_core.wiring.config import Config
from blt_plugins.training.run.make_job import make_job
from blt_plugins.training.run.rebuild import outputs_of
from blt_plugins.training.run.trainer import Trainer
from tests.training import parts


@pytest.fixture
def holding(tables, tmp_path):
    """Makes the job of a model whose global model holds something in a given way."""

    def make(way: str, **train):
        own = {**tables["global_model"], "use": "acme/holding", "way": way}
        settings = {**tables["train"], **train}
        config = Config.from_mapping({**tables, "global_model": own, "train": settings}, "t.toml")
        return make_job(config, parts.plugins(), out=tmp_path / way)

    return make


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("list", "global_model.cells[0] (Linear)"),
        ("parameter", "global_model.shifts['a'] (Parameter)"),
        ("namespace", "global_model.inner.cell (Linear)"),
    ],
)
def test_weights_that_no_state_dict_lists_are_refused_before_training(holding, way, name):
    with pytest.raises(PluginError) as caught:
        holding(way)
    text = str(caught.value)
    assert text.startswith("global model 'acme/holding' (acme-parts): no state_dict lists " + name)
    assert "fix: keep layers in" in text
    assert "nn.ModuleList" in text
    assert "register_buffer" in text


@pytest.mark.parametrize("way", ["noise", "plain-noise"])
def test_what_comes_out_otherwise_at_every_load_is_refused(holding, way):
    text = "global model 'acme/holding' (acme-parts): global_model.table differs whenever"
    with pytest.raises(PluginError, match=re.escape(text)) as caught:
        holding(way)
    assert "persistent=True" in str(caught.value)


@pytest.mark.parametrize("way", ["module-list", "computed", "drop-out"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_listed_or_computed_alike_trains_and_reloads(holding, silent, way, dtype):
    job = holding(way, save_dtype=dtype, steps=6)
    assert Trainer(job, silent()).run().best_bits_per_byte is not None
    assert job.model.module_dict().training, "scores leave the modules in training"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_only_training_shows_is_found_when_the_first_model_is_written(holding, silent, dtype):
    job = holding("grown", save_dtype=dtype, steps=6)
    with pytest.raises(RunError) as caught:
        Trainer(job, silent()).run()
    text = str(caught.value)
    assert text.startswith(f"{job.out / 'model'}: the logits of the model that was written are not")
    assert "it does not hold global_model.table" in text


def test_a_file_that_is_not_what_was_written_is_found(new_job, silent):
    class Lossy:
        """A format that stores zeros for one tensor."""

        def __init__(self, inner):
            self.inner, self.read = inner, inner.read

        def write(self, location, config, tensors):
            name = "decoder.norm.weight"
            self.inner.write(location, config, {**tensors, name: torch.zeros_like(tensors[name])})

    job = new_job(steps=2)
    job = attrs.evolve(job, format=Lossy(job.format))
    with pytest.raises(RunError, match=r"decoder\.norm\.weight cannot be read as it was written"):
        Trainer(job, silent()).run()


def test_the_checks_draw_nothing_from_the_run(new_job):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    new_job()
    assert torch.equal(torch.rand(1), expected)


# -- tied weights ----------------------------------------------------------------------------------


@pytest.fixture
def tied(tables, tmp_path):
    """Makes the job of a model with a tied decoder and a tied byte scorer."""

    def make(out: str, **train):
        own = copy.deepcopy(tables)
        own["decoder"]["use"] = own["patcher"]["byte_scorer"]["use"] = "acme/tied"
        own["train"] |= train
        return make_job(Config.from_mapping(own, "t.toml"), parts.plugins(), out=tmp_path / out)

    return make


def assert_tied(model) -> None:
    for part in (model.decoder, model.patcher.byte_scorer):
        assert part.head.weight is part.embed.weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_weights_are_trained_stored_and_tied_again(tied, silent, dtype):
    job = tied("out", save_dtype=dtype)
    Trainer(job, silent()).run()
    assert_tied(job.model)
    config = Config.from_mapping({"schema": 1, "run": {"checkpoint": str(job.out / "model")}})
    loaded = Pipeline.load(config, parts.plugins()).model
    assert_tied(loaded)
    own = job.model.module_dict().state_dict()
    for name, tensor in loaded.module_dict().state_dict().items():
        assert torch.equal(tensor, own[name].to(getattr(torch, dtype)).float())
    assert loaded.parameter_counts() == job.model.parameter_counts()
    count = sum(p.numel() for p in loaded.decoder.parameters())
    assert loaded.parameter_counts().decoder == count


def test_a_run_with_tied_weights_resumes_bit_for_bit(tied, silent):
    def stop(phase, step):
        if (phase, step) in {("scorer", 6), ("model", 7)}:
            raise KeyboardInterrupt

    whole, again = tied("whole"), tied("again")
    Trainer(whole, silent()).run()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            Trainer(tied("again"), silent(stop)).run()
    Trainer(again, silent()).run()
    assert_tied(again.model)
    ours, theirs = (job.model.module_dict().state_dict() for job in (whole, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_tied_weights_are_converted_and_counted_once(
    tied, silent, blt, tmp_path, monkeypatch, dtype
):
    monkeypatch.setattr("blt_core.cli.converting.load_plugins", parts.plugins)
    job = tied("out", steps=1)
    Trainer(job, silent()).run()
    count = sum(p.numel() for p in job.model.module_dict().parameters())
    source = job.out / "model"
    for target in (tmp_path / "there", tmp_path / "back"):
        done = blt("convert", source, target, "--json", *(["--dtype", dtype] if dtype else []))
        assert done.code == 0, done.err
        assert json.loads(done.out)["parameters"] == count
        source = target
    config = Config.from_mapping({"schema": 1, "run": {"checkpoint": str(source)}})
    loaded = Pipeline.load(config, parts.plugins()).model
    assert_tied(loaded)
    own = outputs_of(job.model)
    theirs = outputs_of(loaded, own.flags_br)
    for name, value in own.values.items():
        close = 0.1 if dtype else 0.0
        torch.testing.assert_close(theirs.values[name], value, rtol=close, atol=close)
