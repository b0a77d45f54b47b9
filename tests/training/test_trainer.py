"""Training runs: they learn, and what computes them otherwise computes the same."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch

from blt_core.component import BuildContext
from blt_core.errors import RunError
from blt_core.pipeline import Pipeline
from blt_core.plugins.loading import load_plugins
from blt_core.storage.tensors import load_tensors
from blt_plugins.training.backends.parameters import parameter_groups
from blt_plugins.training.backends.torch import TorchBackend, TorchBackendParams
from blt_plugins.training.cli.threshold import write_threshold
from blt_plugins.training.data.load import load_data
from blt_plugins.training.run.phases import make_phases
from blt_plugins.training.run.trainer import Trainer
from tests.training.runs import BLOCKS, assert_same_run, metrics, model_scores, stored, tensors_of

# -- learning ------------------------------------------------------------------------------------


def test_a_tiny_model_learns_and_its_checkpoint_is_the_model(new_job, silent, tmp_path):
    job = new_job(steps=60, validate_every=20, scorer={"steps": 40})
    report = silent()
    result = Trainer(job, report).run()
    scores = model_scores(job.out)
    assert len(scores) == 3
    assert scores[-1] < scores[0] < 8
    assert result.best_bits_per_byte == min(scores)
    assert report.losses["scorer", 40] < report.losses["scorer", 1] - 1
    assert report.losses["model", 60] < report.losses["model", 1] - 1.5
    pipeline = Pipeline.from_config({"schema": 1, "run": {"checkpoint": str(job.out / "model")}})
    stored = pipeline.model
    assert stored.patcher.threshold == job.model.patcher.threshold == result.threshold > 0
    assert stored.context_bytes == 64
    load_tensors(stored.module_dict(), tensors_of(job), "test")  # the same names and shapes
    assert len(pipeline.generate("def ", max_new_bytes=8).output) <= 8


def test_the_threshold_is_calibrated_unless_it_is_given(new_job, silent, tables):
    job = new_job(steps=1)
    Trainer(job, silent()).run()
    (found,) = [r for r in metrics(job.out) if "threshold" in r]
    assert found["mean_patch_bytes"] == pytest.approx(4.0, rel=0.1)
    assert job.model.patcher.threshold == found["threshold"]
    tables["patcher"]["threshold"] = 1.25
    job = new_job("given", steps=1)
    Trainer(job, silent()).run()
    assert job.model.patcher.threshold == 1.25
    assert not [r for r in metrics(job.out) if "threshold" in r]


def test_a_patcher_without_a_scorer_needs_no_first_phase(new_job, silent, tables):
    tables["patcher"] = {"use": "static", "patch_bytes": 4}
    job, report = new_job(), silent()
    Trainer(job, report).run()
    assert {phase for phase, _ in report.losses} == {"model"}


def test_the_scorer_stays_as_it_is_while_the_model_is_trained(new_job, silent, tmp_path):
    seen = []

    def look(phase, step):
        scorer = job.model.patcher.byte_scorer.head.weight
        if phase == "model":
            seen.append(scorer.detach().clone())

    job = new_job(save_dtype="bfloat16")
    Trainer(job, silent(look)).run()
    assert all(torch.equal(seen[0], each) for each in seen)
    # What is stored is what the patches of training came from.
    assert torch.equal(seen[0], seen[0].bfloat16().float())


def test_a_backend_that_counts_other_processes_than_the_launcher_is_refused(new_job, silent):
    job = new_job()
    job.backend.rank, job.backend.world_size = 1, 2
    with pytest.raises(RunError, match=r"process 1 of 2, and the environment .* 0 of 1"):
        Trainer(job, silent())


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_passes_make_the_step_of_one_pass_over_all_of_them(new_job, silent, accumulate):
    job = new_job(accumulate=accumulate)
    job.model.patcher.threshold = 5.55
    data = load_data(job.corpus, job.settings, job.model)
    phase = make_phases(job.model, job.objective, job.settings, data.documents, data.windows)[-1]
    phase.module.double()
    job.model.patcher.double()
    batches = [phase.batches[i] for i in range(accumulate)]
    assert len({batch.scored for batch in batches}) > 1, "unequal sizes are the point"
    phase.module.zero_grad()
    scored = sum(batch.scored for batch in batches)
    for batch in batches:
        (phase.module(batch, torch.Generator())[0] * batch.scored / scored).backward()
    expected = torch.cat([p.grad.flatten() for p in phase.module.parameters()]).norm()
    phase.module.zero_grad()
    job.backend.start(
        phase.module, parameter_groups(phase.module, 0), clip=1.0, accumulate=accumulate
    )
    trainer = Trainer(job, silent())
    trainer._folder.open()
    figures, size = trainer._step(phase, phase.module, 0, job.backend)
    assert size == scored
    assert figures["grad_norm"] == pytest.approx(float(expected), rel=1e-9)


class Strict(TorchBackend):
    """A backend that has nothing to answer with before it is started, as many have not."""

    started = False

    def start(self, *arguments, **keys):
        self.started = True
        return super().start(*arguments, **keys)

    def mean(self, values):
        assert self.started, "it was not started"
        return super().mean(values)


@pytest.mark.parametrize("phases", [("scorer",), ("model",), ("scorer", "model")])
def test_a_backend_is_asked_only_once_it_is_started(new_job, silent, tables, phases):
    if phases == ("scorer",):
        for kind in ("encoder", "global_model", "decoder"):
            del tables[kind]
        tables["train"]["steps"] = 0
    for _ in range(2):  # again when it is found finished
        job = new_job(scorer={"steps": 8 if "scorer" in phases else 0})
        strict = Strict(TorchBackendParams(), BuildContext(job.model.scheme))
        assert Trainer(attrs.evolve(job, backend=strict), silent()).run().threshold is not None
        assert strict.started == ("model" in phases)


def test_a_run_begins_by_telling_how_much_text_there_is(new_job, silent):
    job, report = new_job(steps=1), silent()
    Trainer(job, report).run()
    sides = [list(job.corpus.documents(side)) for side in ("train", "valid")]
    (train, size), (valid, held) = ((len(side), sum(map(len, side))) for side in sides)
    assert report.notes[0] == (
        f"corpus: {train} documents ({size} bytes) to train on, "
        f"{valid} documents ({held} bytes) held out"
    )


def test_the_random_choices_of_a_step_are_drawn_on_the_cpu(new_job, silent):
    job = new_job(steps=1)
    seen = []

    class Spy:
        def loss(self, *arguments):
            seen.append(arguments[-1].device)
            return job.objective.loss(*arguments)

    Trainer(attrs.evolve(job, objective=Spy()), silent()).run()
    assert seen == [torch.device("cpu")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_block_diffusion_trains_on_cuda(new_job, silent, tables):
    tables["run"] = {"device": "cuda"}
    tables["objective"] = {"use": "block-diffusion", "share": 0.5, "stale_share": 0.5}
    tables["decoder"]["denoises"] = True
    report = silent()
    Trainer(new_job(), report).run()
    assert ("model", 12) in report.losses


def test_after_its_phase_nothing_is_kept_of_a_scorer_s_optimizer(new_job, silent):
    kept = set()

    def look(phase: str, _step: int) -> None:
        kept.add((phase, len(trainer._scorer_backend._optimizers)))

    trainer = Trainer(new_job(), silent(look))
    trainer.run()
    assert kept == {("scorer", 1), ("model", 0)}


# -- ways to compute the same ----------------------------------------------------------------------


def test_checkpointed_gradients_are_those_of_plain_passes(new_job, silent, tables):
    tables |= {"objective": BLOCKS, "decoder": {**tables["decoder"], "denoises": True}}
    plain, checkpointed = new_job("plain"), new_job("saved", gradient_checkpointing=True)
    for job in (plain, checkpointed):
        Trainer(job, silent()).run()
    assert_same_run(plain, checkpointed)


def test_bfloat16_passes_train_float32_parameters(new_job, silent, tables):
    tables |= {"objective": BLOCKS, "decoder": {**tables["decoder"], "denoises": True}}
    seen = []

    class Spy:
        def loss(self, *arguments):
            loss, figures = blocks.loss(*arguments)
            seen.append(torch.is_autocast_enabled("cpu"))
            return loss, figures

    job, report = new_job(precision="bfloat16", steps=40), silent()
    blocks = job.objective
    Trainer(attrs.evolve(job, objective=Spy()), report).run()
    assert set(seen) == {True}
    assert all(tensor.dtype == torch.float32 for tensor in tensors_of(job).values())
    assert report.losses["model", 40] < report.losses["model", 1] - 1


def test_events_of_tensorboard_tell_what_the_metrics_tell(new_job, silent):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def stop(phase, step):
        if (phase, step) == ("model", 7):
            raise KeyboardInterrupt

    job = new_job(tensorboard=True)
    with pytest.raises(KeyboardInterrupt):
        Trainer(job, silent(stop)).run()
    Trainer(new_job(tensorboard=True), silent()).run()
    events = EventAccumulator(str(job.out / "tensorboard"))
    events.Reload()
    losses = {(r["phase"], r["step"]): r["loss"] for r in metrics(job.out) if "loss" in r}
    found = {
        (phase, event.step): event.value
        for phase in ("scorer", "model")
        for event in events.Scalars(f"{phase}/loss")
    }
    assert found == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("plot", [True, False])
def test_losses_are_drawn_if_they_are_to_be(new_job, silent, plot):
    job = new_job(plot=plot, steps=2)
    result = Trainer(job, silent()).run()
    assert result.plot == (job.out / "losses.png" if plot else None)
    drawn = [path.read_bytes()[:4] for path in job.out.glob("*.png")]
    assert drawn == ([b"\x89PNG"] if plot else [])
    Trainer(new_job(plot=False, steps=2), silent()).run(fresh=True)
    assert not list(job.out.glob("*.png")), "that of another run"


# -- a scorer alone --------------------------------------------------------------------------------


def test_a_scorer_is_trained_alone_and_used_by_a_model(new_job, silent, tables, tmp_path):
    parts = {kind: tables.pop(kind) for kind in ("encoder", "global_model", "decoder")}
    alone = new_job("alone", steps=0, validate_every=4)
    result = Trainer(alone, silent()).run()
    scores = [r["bits_per_byte"] for r in metrics(alone.out) if "bits_per_byte" in r]
    assert len(scores) == 2
    assert result.best_bits_per_byte == scores[-1]
    config, scorer = stored(alone.out / "model")
    assert config["patcher"]["threshold"] == result.threshold > 0
    assert {name.split(".")[0] for name in scorer} == {"patcher"}

    def files() -> dict[Path, tuple[int, bytes]]:
        """What the run has written but for its plot, which is drawn again."""
        paths = [*alone.out.glob("model/*"), *alone.out.glob("state/*/*")]
        kept = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}
        return kept | {alone.out: (0, (alone.out / "metrics.jsonl").read_bytes())}

    write_threshold(str(alone.out / "model"), 1.25, load_plugins())  # blt calibrate --write
    before, report = files(), silent()
    again = Trainer(new_job("alone", steps=0, validate_every=4), report).run()
    assert again == attrs.evolve(result, held_out=None)
    assert report.notes[1:] == ["already finished (scorer step 8); --fresh trains anew"]
    assert files() == before
    write_threshold(str(alone.out / "model"), result.threshold, load_plugins())

    tables |= parts
    del tables["patcher"], tables["train"]["scorer"]
    given = {"checkpoint": str(alone.out / "model")}
    tables["train"]["scorer"] = {}
    job, report = new_job("model", scorer=given), silent()
    Trainer(job, report).run()
    assert {phase for phase, _ in report.losses} == {"model"}
    assert job.model.patcher.threshold == result.threshold
    ours = tensors_of(job)
    assert all(torch.equal(ours[name], tensor) for name, tensor in scorer.items())
    assert (
        len(
            Pipeline.from_config({"schema": 1, "run": {"checkpoint": str(job.out / "model")}})
            .generate("def ", max_new_bytes=4)
            .output
        )
        <= 4
    )
