"""The training loop: phases, steps, held-out scores, checkpoints, and exact resume.

A step's data and random numbers are functions of the seed and the step's number, and the state
holds all that steps change. So a run that was stopped goes on bit for bit where it was saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import torch
from torch import Tensor

from blt_core.checkpoint import load_tensors, model_config, model_tensors
from blt_core.errors import DataError, RunError
from blt_core.model import Model
from blt_core.protocols import (
    CheckpointFormat,
    Corpus,
    Objective,
    ThresholdPatcher,
    TrainingBackend,
)
from blt_plugins.training.calibrate import Calibration, calibrate
from blt_plugins.training.evaluate import HeldOut, evaluate_model, evaluate_scorer
from blt_plugins.training.phases import MODEL, SCORER, Phase, make_phases, trainable_scorer
from blt_plugins.training.report import Metrics, Report
from blt_plugins.training.schedule import learning_rate, parameter_groups
from blt_plugins.training.settings import TrainSettings
from blt_plugins.training.state import (
    TrainingState,
    check_same_settings,
    load_state,
    save_state,
)
from blt_plugins.training.windows import Batch, cut_windows, make_batch, pack, sample

#: Settings that may change when a run is resumed, since no step depends on them.
FREE = ("out", "log_every", "checkpoint_every", "validate_every")


@attrs.frozen(eq=False, kw_only=True)
class Job:
    """All that a run needs, built. ``tables``: of the model and its training, for the state.

    calibrates: whether the patcher's threshold is to be found. out: where everything is written.
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
    """How a run ended. ``model``: the folder of the model with the best held-out score."""

    steps: int
    threshold: float | None
    held_out: HeldOut | None
    best_bits_per_byte: float | None
    model: Path


class Trainer:
    """Runs a job; ``run`` may be called once."""

    def __init__(self, job: Job, report: Report) -> None:
        self._job, self._report, self._settings = job, report, job.settings
        self._metrics = Metrics(job.out / "metrics.jsonl")
        self._best: float | None = None
        self._held_out: HeldOut | None = None
        self._saved_step: str | None = None
        self._stopping = False
        documents = list(job.corpus.documents("train"))
        context = job.settings.context_bytes or job.model.context_bytes
        if context > job.model.context_bytes:
            raise DataError(
                f"train.context_bytes: {context} is more than the model serves "
                f"(model.context_bytes = {job.model.context_bytes})"
            )
        if not documents:
            raise DataError("the corpus has no document to train on")
        windows = cut_windows(documents, context)
        valid = list(job.corpus.documents("valid")) if job.settings.valid_bytes else []
        if job.settings.valid_bytes and not valid:
            raise DataError(
                "the corpus holds no document out; give corpus.valid_path, raise "
                "corpus.valid_percent, or set train.valid_bytes = 0"
            )
        self._phases = make_phases(job.model, job.objective, job.settings, documents, windows)
        self._valid = self._sample(valid, cut_windows(valid, context), job.settings.valid_bytes)
        self._calibration = self._sample(
            documents, windows, job.settings.scorer.calibration_bytes
        )
        self._tables = comparable(job.tables, documents, valid)

    def run(self, *, fresh: bool = False) -> TrainResult:
        """Train to the end, going on from a saved state unless ``fresh``.

        Raises RunError if the loss is no number any more, or if the run was interrupted; then a
        state is saved.
        """
        state = self._begin(fresh=fresh)
        with self._interrupts():
            for phase in self._phases:
                if state is not None and phase.name != state.phase:
                    continue  # it was finished before the state was saved
                self._run_phase(phase, state)
                state = None
        return self._finish()

    # -- starting and stopping -------------------------------------------------------------------

    def _begin(self, *, fresh: bool) -> TrainingState | None:
        """The state to go on from, loaded into the model; None for a new run."""
        out = self._job.out
        out.mkdir(parents=True, exist_ok=True)
        if fresh:
            shutil.rmtree(out / "state", ignore_errors=True)
        state = load_state(out / "state")
        if state is None:
            self._metrics.rewind({})
            return None
        check_same_settings(out, state, self._tables)
        load_tensors(self._job.model.modules(), state.model, str(out / "state"))
        if state.threshold is not None and isinstance(self._job.model.patcher, ThresholdPatcher):
            self._job.model.patcher.threshold = state.threshold
        torch.set_rng_state(state.generator)
        self._best = state.best
        self._saved_step = f"{state.phase} step {state.step}"
        finished = {SCORER: 10**12} if state.phase == MODEL else {}
        self._metrics.rewind({**finished, state.phase: state.step})
        self._report.note(f"resumed at {self._saved_step}")
        return state

    @contextlib.contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop the run after the step; a second one stops it at once."""

        def stop(number: int, _frame: FrameType | None) -> None:
            if self._stopping:
                raise KeyboardInterrupt
            self._stopping = True
            self._report.note(f"{signal.Signals(number).name}: stopping after this step")

        try:
            former = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: its owner handles signals
            former = {}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _finish(self) -> TrainResult:
        out, model = self._job.out, self._job.model
        if self._best is None:
            self._write_model("model")
        elif self._held_out is not None and self._held_out.bits_per_byte > self._best:
            self._write_model("model-last")
        return TrainResult(
            steps=self._settings.steps,
            threshold=getattr(model.patcher, "threshold", None),
            held_out=self._held_out,
            best_bits_per_byte=self._best,
            model=out / "model",
        )

    # -- phases ----------------------------------------------------------------------------------

    def _run_phase(self, phase: Phase, state: TrainingState | None) -> None:
        first = state.step if state is not None else 0
        groups = parameter_groups(phase.module, self._settings.weight_decay)
        self._job.backend.start(
            phase.module, groups, clip=self._settings.clip, accumulate=phase.accumulate
        )
        if state is not None:
            self._job.backend.restore(state.optimizer)
        self._report.phase(phase.name, first, phase.steps)
        clock = Clock()
        for step in range(first, phase.steps):
            with clock:
                loss, norm, rate, size = self._step(phase, step)
            clock.size += size
            self._after_step(phase, step + 1, clock, {"loss": loss, "lr": rate, "grad_norm": norm})
        self._end_phase(phase)

    def _step(self, phase: Phase, step: int) -> tuple[float, float, float, int]:
        """One optimizer step: loss (nats a byte), gradient norm, learning rate, bytes."""
        backend, count = self._job.backend, phase.accumulate
        device = self._job.model.device
        batches = [phase.batches[step * count + i].to(device) for i in range(count)]
        size = sum(batch.scored for batch in batches)
        rng = torch.Generator(device).manual_seed(seed_of(self._settings.seed, phase.name, step))
        total = 0.0
        for batch in batches:
            loss, share = phase.loss(batch, rng), batch.scored / size
            total += float(loss.detach()) * share
            self._check_finite("loss", total, phase, step)
            # The backend averages; batches of unequal size count by their bytes.
            backend.backward(loss * (share * count))
        rate = learning_rate(
            step,
            steps=phase.steps,
            peak=phase.learning_rate,
            warmup_steps=phase.warmup_steps,
            final_rate=self._settings.final_rate,
        )
        norm = backend.step(rate)
        self._check_finite("gradient norm", norm, phase, step)
        return total, norm, rate, size

    def _after_step(
        self, phase: Phase, done: int, clock: Clock, figures: dict[str, float]
    ) -> None:
        figures["bytes_per_second"] = clock.speed
        self._report.step(done, figures)
        if done % self._settings.log_every == 0 or done == phase.steps:
            self._metrics.write(phase=phase.name, step=done, **figures)
            clock.restart()
        last = done == phase.steps
        if phase.name == MODEL and (done % self._settings.validate_every == 0 or last):
            self._validate(done)
        if last:
            return
        if done % self._settings.checkpoint_every == 0 or self._stopping:
            self._save(phase.name, done)
        self._stop_if_asked(f"{phase.name} step {done}")

    def _end_phase(self, phase: Phase) -> None:
        if phase.name == SCORER:
            self._end_scorer(phase)
            self._job.backend.start(self._phases[-1].module, [], clip=1.0, accumulate=1)
            self._save(MODEL, 0)
            self._stop_if_asked("the end of the scorer's training")
        else:
            self._save(MODEL, phase.steps)

    def _end_scorer(self, phase: Phase) -> None:
        round_parameters(phase.module, self._dtype)
        if self._valid:
            held_out = evaluate_scorer(trainable_scorer(self._job.model), self._valid)
            self._metrics.write(
                phase=SCORER, step=phase.steps, bits_per_byte=held_out.bits_per_byte
            )
            self._report.note(f"scorer: {held_out.bits_per_byte:.4f} held-out bits per byte")

    def _stop_if_asked(self, where: str) -> None:
        if self._stopping:
            raise RunError(
                f"interrupted at {where}; saved in {self._job.out}. "
                "Run the same command again to go on."
            )

    def _check_finite(self, what: str, value: float, phase: Phase, step: int) -> None:
        if math.isfinite(value):
            return
        saved = f"the last good state is {self._job.out / 'state'} ({self._saved_step})"
        raise RunError(
            f"{phase.name} step {step + 1}: the {what} is {value}; "
            f"{saved if self._saved_step else 'no state was saved yet'}.\n"
            "  fix: lower train.learning_rate or train.clip and start anew with --fresh"
        )

    # -- scores and files ------------------------------------------------------------------------

    def _validate(self, step: int) -> None:
        if not self._valid:
            return
        result = evaluate_model(self._job.model, self._valid)
        self._held_out = result
        self._metrics.write(
            phase=MODEL,
            step=step,
            bits_per_byte=result.bits_per_byte,
            mean_patch_bytes=result.mean_patch_bytes,
        )
        better = self._best is None or result.bits_per_byte < self._best
        if better:
            self._best = result.bits_per_byte
            self._write_model("model")
        self._report.note(
            f"model step {step}: {result.bits_per_byte:.4f} held-out bits per byte, patches of "
            f"{result.mean_patch_bytes:.2f} bytes" + (", the best so far" if better else "")
        )

    def _write_model(self, name: str) -> None:
        tensors = model_tensors(self._job.model, self._dtype)
        self._job.format.write(self._job.out / name, model_config(self._job.model), tensors)

    def _save(self, phase: str, step: int) -> None:
        patcher = self._job.model.patcher
        save_state(
            self._job.out / "state",
            TrainingState(
                phase=phase,
                step=step,
                threshold=getattr(patcher, "threshold", None),
                best=self._best,
                settings=self._tables,
                model=model_tensors(self._job.model),
                optimizer=self._job.backend.state(),
            ),
        )
        self._saved_step = f"{phase} step {step}"

    def _sample(
        self, documents: Sequence[bytes], windows: Sequence[Any], size: int
    ) -> list[Batch]:
        """Batches of sampled windows on the model's device, for scores and calibration."""
        chosen = sample(windows, size, self._settings.seed)
        groups = pack(chosen, self._settings.batch_bytes)
        return [make_batch(documents, group, self._job.model.scheme) for group in groups]

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._settings.save_dtype)
        return dtype
