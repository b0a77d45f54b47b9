"""The judge of a run: the threshold, the held-out scores, and which model is the best."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeGuard

import torch
from torch import nn

from blt_core.errors import RunError
from blt_core.protocols import ThresholdPatcher, TrainingBackend
from blt_plugins.training.data.load import Data
from blt_plugins.training.data.shares import Share
from blt_plugins.training.objectives.losses import MODEL, PATCHES, SCORER
from blt_plugins.training.run.folder import RunFolder
from blt_plugins.training.run.interrupts import Interrupts, Stopped
from blt_plugins.training.run.job import BEST, LAST, Job
from blt_plugins.training.run.phases import Phase
from blt_plugins.training.run.report import Report
from blt_plugins.training.run.together import Together
from blt_plugins.training.scores.calibration import calibrate
from blt_plugins.training.scores.held_out import HeldOut, evaluate_scorer
from blt_plugins.training.scores.validation import validate
from blt_plugins.training.setup.blocks import block_sizes
from blt_plugins.training.setup.scorer import TrainableScorer, round_parameters, trainable_scorer

#: Blocks that drafts are judged by where the objective does not say how long its own are.
BLOCK_BYTES = 16


class Judge:
    """Scores what a run trains, and has the folder keep the best.

    best: the best held-out bits per byte so far. held_out: the last score. Each process scores its
    share of the held-out text. Work ends between two batches, in all processes in the same round,
    once any of them was asked to stop or has failed.
    """

    def __init__(
        self, job: Job, data: Data, folder: RunFolder, report: Report, interrupts: Interrupts
    ) -> None:
        self._job, self._data, self._folder = job, data, folder
        self._report, self._interrupts = report, interrupts
        self.best: float | None = None
        self.held_out: HeldOut | None = None

    def score(self, phase: Phase, done: int, backend: TrainingBackend, *, alone: bool) -> bool:
        """Score what is trained; False if that was cut short, in all processes, by a signal.

        A scorer that is trained ``alone`` is finished after its last step: calibrated and written.
        """
        try:
            # Gathering takes memory, which a run without held-out text may not have.
            with backend.whole() if self._data.valid.rounds else nullcontext():
                if phase.name == SCORER:
                    self._score_scorer(phase, done, backend, alone=alone)
                else:
                    self._score_model(phase, done, backend)
            if alone and done == phase.steps:
                self.fix_patches(backend)
                self._folder.write_model(BEST, backend)
        except Stopped:
            return False
        return True

    def fix_patches(self, backend: TrainingBackend) -> None:
        """Calibrate the patcher where its threshold is not given; raises Stopped.

        First its scorer is rounded to what is stored, so that training sees the patches of later
        use. backend: the scorer's, since the model's may not be on.
        """
        patcher, settings = self._job.model.patcher, self._job.settings
        with _kept_if_stopped(trainable_scorer(self._job.model)) as scorer:
            if scorer:
                round_parameters(scorer, getattr(torch, settings.save_dtype))
            if not self._job.calibrates or not isinstance(patcher, ThresholdPatcher):
                return
            together = self._together(backend, "calibration")
            with together.work():
                # Every process measures all of it, as the threshold depends on each entropy.
                batches = together.each(Share.whole(self._data.calibration))
                found = calibrate(patcher, batches, settings.scorer.target_patch_bytes)
        patcher.threshold = of_first(backend, found.threshold)
        self._folder.record(
            phase=PATCHES,
            step=0,
            threshold=found.threshold,
            mean_patch_bytes=found.mean_patch_bytes,
        )
        self._report.note(
            f"threshold {found.threshold:.4f} nats: patches of "
            f"{found.mean_patch_bytes:.2f} bytes on average"
        )

    def check_finite(self, what: str, value: float, phase: Phase, step: int) -> None:
        """Raise RunError, with what is good so far and what to do, for what is no number."""
        if math.isfinite(value):
            return
        self._folder.background.finish()  # the value is that of all processes, so all are here
        good = f"the last good state is {self._folder.saved}"
        if phase.name == MODEL and self.best is not None:
            good += f", the best model so far {self._job.out / BEST}"
        raise RunError(
            f"{phase.name} step {step + 1}: the {what} is {value}; {good}\n"
            f"  fix: {self._remedy(phase, step)}, and start anew with --fresh"
        )

    def _remedy(self, phase: Phase, step: int) -> str:
        """What to do about a loss or gradient of ``step`` that is no number."""
        source = self._job.objective_label if phase.name == MODEL else "the byte scorer"
        if step:
            return f"lower the learning rate; if that changes nothing, look at {source}"
        start = self._job.tables.get("run", {}).get("checkpoint") or "how its parts draw weights"
        return (
            "no step was taken, so the learning rate has no part in it: look at "
            f"{source} and at the weights that training starts from ({start})"
        )

    def _together(self, backend: TrainingBackend, what: str) -> Together:
        return Together(backend, lambda: self._interrupts.asked, what)

    def _score_scorer(
        self, phase: Phase, step: int, backend: TrainingBackend, *, alone: bool
    ) -> None:
        scorer = trainable_scorer(self._job.model)
        if scorer is None or not self._data.valid.rounds:
            return
        together = self._together(backend, f"held-out score of {phase.name} step {step}")
        with together.work():
            batches = together.each(self._data.valid)
            scheme = self._job.model.scheme
            held_out = evaluate_scorer(scorer.part, batches, scheme, together.total)
        self.check_finite("held-out score", held_out.bits_per_byte, phase, step - 1)
        if alone:
            self.held_out, self.best = held_out, held_out.bits_per_byte
        self._folder.record(phase=SCORER, step=step, bits_per_byte=held_out.bits_per_byte)
        self._report.note(
            f"scorer step {step}: {held_out.bits_per_byte:.4f} held-out bits per byte"
        )

    def _score_model(self, phase: Phase, step: int, backend: TrainingBackend) -> None:
        """Score the model, and write it if it is the best so far, or else the last."""
        job, last, data = self._job, step == phase.steps, self._data
        if not data.valid.rounds:
            if last:
                self._folder.write_model(BEST, backend)
            return
        after = job.settings.marker(job.model.scheme)
        trained = block_sizes(getattr(job.objective, "block_bytes", None))
        together = self._together(backend, f"held-out scores of {phase.name} step {step}")
        with together.work():
            scores = validate(
                job.model,
                data.valid.map(lambda batch: batch.after(after)) if after else data.valid,
                data.prefixes,
                job.plugins,
                block_bytes=max(trained, default=BLOCK_BYTES),
                longest_prefix=data.longest_prefix,
                processes=together,
            )
        self.held_out = result = scores.held_out
        score = result.bits_per_byte
        better = is_score(score) and (self.best is None or score < self.best)
        # All have to take part in a write, though a sum may round apart on different machines.
        better = of_first(backend, float(better)) > 0
        self._folder.record(phase=MODEL, step=step, **scores.record())
        if better:
            self.best = score
        if better or last:
            self._folder.write_model(BEST if better else LAST, backend)
        self._report.note(
            f"model step {step}: {scores.describe()}{', the best so far' if better else ''}"
        )


def is_score(value: float | None) -> TypeGuard[float]:
    """Whether a score can be the best one: nothing compares as less than one that is no number."""
    return value is not None and math.isfinite(value)


def of_first(backend: TrainingBackend, value: float) -> float:
    """Process 0's ``value`` in every process, to the last bit.

    A mean of the number itself could round; of integers as short as its halves it cannot.
    """
    halves = struct.unpack("<2I", struct.pack("<d", value))
    means = backend.mean([half if backend.rank == 0 else 0 for half in halves])
    whole = [round(mean * backend.world_size) for mean in means]
    found: float = struct.unpack("<d", struct.pack("<2I", *whole))[0]
    return found


@contextmanager
def _kept_if_stopped(scorer: TrainableScorer | None) -> Iterator[nn.Module | None]:
    """The scorer's module, whose parameters are put back if the block is Stopped."""
    if scorer is None:
        yield None
        return
    before = {name: tensor.clone() for name, tensor in scorer.module.state_dict().items()}
    try:
        yield scorer.module
    except Stopped:
        scorer.module.load_state_dict(before)
        raise
