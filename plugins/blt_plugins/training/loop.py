"""The training loop: phases, steps, held-out scores, checkpoints, and exact resume.

A step's data and random numbers are functions of the seed and the step's number, and the state
holds all that steps change. So a run that was stopped goes on bit for bit where it was saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blt_core.checkpoint import (
    MODEL_FILES,
    check_replaceable,
    file_errors,
    load_tensors,
    model_config,
    model_tensors,
)
from blt_core.errors import DataError, RunError
from blt_core.model import Model
from blt_core.protocols import (
    CheckpointFormat,
    Corpus,
    Objective,
    ThresholdPatcher,
    TrainingBackend,
)
from blt_plugins.training.calibrate import calibrate
from blt_plugins.training.data import load_data
from blt_plugins.training.evaluate import HeldOut, evaluate_model, evaluate_scorer
from blt_plugins.training.interrupts import Interrupts
from blt_plugins.training.memory import keep_freed_memory
from blt_plugins.training.phases import (
    MODEL,
    PATCHES,
    SCORER,
    Phase,
    make_phases,
    trainable_scorer,
)
from blt_plugins.training.report import Metrics, Report
from blt_plugins.training.schedule import parameter_groups
from blt_plugins.training.settings import TrainSettings
from blt_plugins.training.state import (
    STATE_FILES,
    TrainingState,
    check_same_settings,
    load_state,
    save_state,
)

#: Settings that may change when a run is resumed, since no step depends on them.
FREE = ("out", "log_every", "checkpoint_every", "validate_every")


@attrs.frozen(eq=False, kw_only=True)
class Job:
    """All that a run needs, built.

    tables: the model's and its training's, which a resumed run must share. calibrates: whether
    the patcher's threshold is to be found. out: the folder where everything is written.
    """

    model: Model
    corpus: Corpus
    objective: Objective
    backend: TrainingBackend
    format: CheckpointFormat
    settings: TrainSettings
    tables: Mapping[str, Any]
    calibrates: bool
    out: Path


@attrs.frozen
class TrainResult:
    """How a run ended.

    held_out: the score at the end, None if the run was found finished. model: the folder of the
    model with the best score.
    """

    threshold: float | None
    held_out: HeldOut | None
    best_bits_per_byte: float | None
    model: Path


class Trainer:
    """Runs a job; raises DataError, when it is made, where the corpus is unfit."""

    def __init__(self, job: Job, report: Report) -> None:
        self._job, self._report, self._settings = job, report, job.settings
        self._metrics = Metrics(job.out / "metrics.jsonl")
        self._interrupts = Interrupts(report.note)
        self._data = load_data(job.corpus, job.settings, job.model)
        self._best: float | None = None
        self._held_out: HeldOut | None = None
        self._saved = ""

    def run(self, *, fresh: bool = False) -> TrainResult:
        """Train to the end, going on from a saved state unless ``fresh``.

        Raises RunError if the loss is no number any more, or after an interrupt; what was saved
        is complete. Raises OtherSettingsError if the state belongs to another configuration,
        DataError if something else is in the way of what is to be written.
        """
        job, settings = self._job, self._settings
        keep_freed_memory()
        self._report.note(self._data.summary)
        self._check_out()
        state = self._restore(fresh=fresh)
        phases = make_phases(
            job.model, job.objective, settings, self._data.documents, self._data.windows
        )
        with self._interrupts:
            for phase in phases:
                if state is not None and state.phase != phase.name:
                    continue  # it was over when the state was saved
                if state is None:
                    self._begin(phase)
                self._run_phase(phase, state)
                state = None
        return TrainResult(
            threshold=getattr(job.model.patcher, "threshold", None),
            held_out=self._held_out,
            best_bits_per_byte=self._best,
            model=job.out / "model",
        )

    def _check_out(self) -> None:
        """Make the folder of the run, where all that will be written must have room."""
        out = self._job.out
        with file_errors(out, DataError):
            out.mkdir(parents=True, exist_ok=True)
        check_replaceable(out / "state", STATE_FILES)
        for name in ("model", "model-last"):
            check_replaceable(out / name, MODEL_FILES)

    def _restore(self, *, fresh: bool) -> TrainingState | None:
        """The state to go on from, loaded into the model; None for a new run."""
        folder, model = self._job.out / "state", self._job.model
        state = None if fresh else load_state(folder)
        if state is None:
            self._metrics.rewind({})
            return None
        check_same_settings(self._job.out, state, self._tables())
        load_tensors(model.modules(), state.model, str(folder))
        if state.threshold is not None and isinstance(model.patcher, ThresholdPatcher):
            model.patcher.threshold = state.threshold
        torch.set_rng_state(state.generator)
        self._best, self._saved = state.best, f"{state.phase} step {state.step}"
        whole = {SCORER: self._settings.scorer.steps, PATCHES: 0} if state.phase == MODEL else {}
        self._metrics.rewind({**whole, state.phase: state.step})
        if state.phase == MODEL and state.step == self._settings.steps:
            self._report.note(f"already finished ({self._saved}); --fresh trains anew")
        else:
            self._report.note(f"resumed at {self._saved}")
        return state

    def _tables(self) -> dict[str, Any]:
        """What must not change between the parts of a run."""
        train = {k: v for k, v in attrs.asdict(self._settings).items() if k not in FREE}
        return {**self._job.tables, "train": train, "text": self._data.digest}

    # -- phases ----------------------------------------------------------------------------------

    def _run_phase(self, phase: Phase, state: TrainingState | None) -> None:
        first = state.step if state is not None else 0
        backend, clock = self._job.backend, Clock()
        groups = parameter_groups(phase.module, self._settings.weight_decay)
        backend.start(phase.module, groups, clip=self._settings.clip, accumulate=phase.accumulate)
        if state is not None:
            backend.restore(state.optimizer)
        self._report.phase(phase.name, first, phase.steps)
        for step in range(first, phase.steps):
            began = time.perf_counter()
            figures, size = self._step(phase, step)
            clock.add(size, time.perf_counter() - began)
            self._log(phase, step + 1, {**figures, "bytes_per_second": clock.speed})
            if self._is_due(self._settings.log_every, phase, step + 1):
                clock = Clock()
            self._look_after(phase, step + 1)
        if phase.name == SCORER:
            self._end_scorer()

    def _step(self, phase: Phase, step: int) -> tuple[dict[str, float], int]:
        """One optimizer step: its figures (loss in nats a byte) and its bytes."""
        backend, count, device = self._job.backend, phase.accumulate, self._job.model.device
        batches = [phase.batches[step * count + i].to(device) for i in range(count)]
        size = sum(batch.scored for batch in batches)
        rng = torch.Generator().manual_seed(phase.seed_of(step))
        means: dict[str, float] = {}
        for batch in batches:
            (loss, figures), share = phase.loss(batch, rng), batch.scored / size
            for name, value in {"loss": float(loss.detach()), **figures}.items():
                means[name] = means.get(name, 0.0) + share * value
            self._check_finite("loss", means["loss"], phase, step)
            # The backend averages, yet batches of unequal size count by their bytes.
            backend.backward(loss * (share * count))
        rate = phase.schedule.rate(step)
        norm = backend.step(rate)
        self._check_finite("gradient norm", norm, phase, step)
        return {**means, "lr": rate, "grad_norm": norm}, size

    def _log(self, phase: Phase, done: int, figures: Mapping[str, float]) -> None:
        self._report.step(done, figures)
        if self._is_due(self._settings.log_every, phase, done):
            self._metrics.write(phase=phase.name, step=done, **figures)

    def _look_after(self, phase: Phase, done: int) -> None:
        """What happens between two steps: a score, a checkpoint, the end on request."""
        at_end = done == phase.steps
        if phase.name == MODEL and self._is_due(self._settings.validate_every, phase, done):
            self._validate(done, last=at_end)
        if self._is_due(self._settings.checkpoint_every, phase, done) or self._interrupts.asked:
            self._save(phase.name, done, self._job.backend.state())
        if self._interrupts.asked and not (at_end and phase.name == MODEL):
            raise RunError(
                f"interrupted at {phase.name} step {done}, which is saved in {self._job.out}; "
                "run the same command again to go on"
            )

    @staticmethod
    def _is_due(every: int, phase: Phase, done: int) -> bool:
        return done % every == 0 or done == phase.steps

    def _check_finite(self, what: str, value: float, phase: Phase, step: int) -> None:
        if math.isfinite(value):
            return
        raise RunError(
            f"{phase.name} step {step + 1}: the {what} is {value}; the last good state is "
            f"{self._job.out / 'state'} ({self._saved})\n"
            "  fix: lower the learning rate, and start anew with --fresh"
        )

    # -- between the phases ----------------------------------------------------------------------

    def _end_scorer(self) -> None:
        """Log the scorer's score."""
        scorer = trainable_scorer(self._job.model)
        if scorer is None or not self._data.valid:
            return
        held_out = evaluate_scorer(scorer.part, self._data.valid, self._job.model.scheme)
        self._metrics.write(phase=PATCHES, step=0, scorer_bits_per_byte=held_out.bits_per_byte)
        self._report.note(f"scorer: {held_out.bits_per_byte:.4f} held-out bits per byte")

    def _begin(self, phase: Phase) -> None:
        """Save the state in which a phase begins, in the place of what a former run left."""
        if phase.name == MODEL:
            self._fix_patches()
        self._save(phase.name, 0, {})

    def _fix_patches(self) -> None:
        """Calibrate the patcher where its threshold is not given.

        First its scorer is rounded to what is stored, so that training sees the patches of later
        use.
        """
        patcher = self._job.model.patcher
        if scorer := trainable_scorer(self._job.model):
            round_parameters(scorer.module, self._dtype)
        if self._job.calibrates and isinstance(patcher, ThresholdPatcher):
            target = self._settings.scorer.target_patch_bytes
            found = calibrate(patcher, self._data.calibration, target)
            patcher.threshold = found.threshold
            self._metrics.write(
                phase=PATCHES,
                step=0,
                threshold=found.threshold,
                mean_patch_bytes=found.mean_patch_bytes,
            )
            self._report.note(
                f"threshold {found.threshold:.4f} nats: patches of "
                f"{found.mean_patch_bytes:.2f} bytes on average"
            )

    # -- scores and files ------------------------------------------------------------------------

    def _validate(self, step: int, *, last: bool) -> None:
        """Score the model, and write it if it is the best so far, or else the ``last``."""
        if not self._data.valid:
            if last:
                self._write_model("model")
            return
        result = evaluate_model(self._job.model, self._data.valid)
        better = self._best is None or result.bits_per_byte < self._best
        self._held_out = result
        self._metrics.write(
            phase=MODEL,
            step=step,
            bits_per_byte=result.bits_per_byte,
            mean_patch_bytes=result.mean_patch_bytes,
        )
        if better:
            self._best = result.bits_per_byte
        if better or last:
            self._write_model("model" if better else "model-last")
        self._report.note(
            f"model step {step}: {result.bits_per_byte:.4f} held-out bits per byte, patches of "
            f"{result.mean_patch_bytes:.2f} bytes{', the best so far' if better else ''}"
        )

    def _write_model(self, name: str) -> None:
        model = self._job.model
        self._job.format.write(
            self._job.out / name, model_config(model), model_tensors(model, self._dtype)
        )

    def _save(self, phase: str, step: int, optimizer: Mapping[str, Tensor]) -> None:
        model = self._job.model
        state = TrainingState(
            phase=phase,
            step=step,
            threshold=getattr(model.patcher, "threshold", None),
            best=self._best,
            settings=self._tables(),
            model=model_tensors(model),
            optimizer=optimizer,
        )
        save_state(self._job.out / "state", state)
        self._saved = f"{phase} step {step}"

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._settings.save_dtype)
        return dtype


class Clock:
    """Bytes and seconds of some steps, without what happened between them."""

    def __init__(self) -> None:
        self._bytes, self._seconds = 0, 0.0

    def add(self, size: int, seconds: float) -> None:
        """Count one step."""
        self._bytes, self._seconds = self._bytes + size, self._seconds + seconds

    @property
    def speed(self) -> float:
        """Bytes a second."""
        return self._bytes / max(self._seconds, 1e-9)


@torch.no_grad()
def round_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter a value that ``dtype`` can hold; its own dtype stays."""
    for parameter in module.parameters():
        parameter.copy_(parameter.to(dtype))
