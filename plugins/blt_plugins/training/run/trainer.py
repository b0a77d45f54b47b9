"""The training loop: phases, steps, held-out scores, checkpoints, and exact resume.

A step's data and random numbers are functions of the seed and the step's number, and the state
holds all that steps change. So a run that was stopped goes on bit for bit where it was saved. A
step has the same passes in any number of processes, which only share them out.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import attrs
import torch
from torch import Tensor, nn

from blt_core.errors import CheckpointError, DataError, RunError
from blt_core.files import is_dross
from blt_core.protocols import ThresholdPatcher, TrainingBackend
from blt_core.storage.folders import MODEL_FILES, check_replaceable, file_errors
from blt_core.storage.tensors import model_config
from blt_plugins.training.backends.parameters import parameter_groups
from blt_plugins.training.backends.torch import scorer_backend
from blt_plugins.training.data.load import load_data
from blt_plugins.training.data.order import ORDER
from blt_plugins.training.data.windows import Batch
from blt_plugins.training.objectives.figures import check_same_figures
from blt_plugins.training.objectives.losses import MODEL, PATCHES, SCORER
from blt_plugins.training.run.interrupts import Interrupts, Stopped
from blt_plugins.training.run.job import BEST, LAST, Job, TrainResult
from blt_plugins.training.run.malloc import keep_freed_memory
from blt_plugins.training.run.metrics import Metrics, plot_losses
from blt_plugins.training.run.phases import Phase, make_phases
from blt_plugins.training.run.rebuild import check_reloads, check_written, outputs_of
from blt_plugins.training.run.report import Report
from blt_plugins.training.run.states import (
    Found,
    States,
    TrainingState,
    check_same_settings,
    discard,
    tidy_model,
)
from blt_plugins.training.scores.calibration import calibrate
from blt_plugins.training.scores.held_out import HeldOut, evaluate_scorer
from blt_plugins.training.scores.validation import validate
from blt_plugins.training.setup.scorer import TrainableScorer, round_parameters, trainable_scorer

#: Settings that may change when a run is resumed, since no step depends on them.
FREE = (
    *("out", "log_every", "checkpoint_every", "validate_every", "keep_states"),
    *("valid_drafts", "tensorboard"),
)
#: Blocks that drafts are judged by where the objective does not say how long its own are.
BLOCK_BYTES = 16

T = TypeVar("T")


class Trainer:
    """Runs a job; raises DataError, when it is made, where the corpus is unfit."""

    def __init__(self, job: Job, report: Report) -> None:
        self._job, self._report, self._settings = job, report, job.settings
        self._scorer_backend = scorer_backend(job.backend, job.model.scheme)
        self._backend, self._main = job.backend, job.backend.rank == 0
        self._alone = False
        events = job.out / "tensorboard" if self._settings.tensorboard else None
        self._metrics = Metrics(job.out / "metrics.jsonl", events)
        self._interrupts = Interrupts(report.note)
        self._data = load_data(job.corpus, job.settings, job.model)
        self._best: float | None = None
        self._held_out: HeldOut | None = None
        # The folder of the last state that was saved, or that the run goes on from.
        self._saved: Path | None = None
        self._stopping = False
        # Whether a model that was written has been read again.
        self._reloads = False

    def run(self, *, fresh: bool = False) -> TrainResult:
        """Train to the end, going on from a saved state unless ``fresh``.

        Raises RunError if the loss is no number any more, or after an interrupt; what was saved
        is complete. Raises OtherSettingsError if the state belongs to another configuration,
        DataError if something else is in the way of what is to be written.
        """
        job = self._job
        keep_freed_memory()
        self._report.note(self._data.summary)
        phases = make_phases(
            job.model,
            job.objective,
            self._settings,
            self._data.documents,
            self._data.windows,
            label=job.objective_label,
        )
        self._alone = phases[-1].name == SCORER
        states = self._open_out(phases)
        found = self._restore(states, phases, fresh=fresh)
        try:
            with self._interrupts:
                for phase in phases:
                    if found is not None and found.state.phase != phase.name:
                        continue  # it was over when the state was saved
                    self._run_phase(phase, states, found)
                    found = None
                self._backend.mean([])  # no process leaves while another still waits for it
        except Stopped:
            saved = f"what was saved ({self._saved})" if self._saved else "nothing, which"
            raise RunError(
                f"interrupted in the calibration, before a step of {phase.name}; {saved} is "
                "complete; run the same command again to go on"
            ) from None
        finally:
            self._metrics.close()
            job.backend.close()
            self._scorer_backend.close()
        return self._end()

    def _end(self) -> TrainResult:
        job, plot = self._job, self._job.out / "losses.png"
        if self._best is None and self._data.valid:
            raise RunError(
                f"{job.out / BEST}: not written, since no held-out score was a finite number; the "
                f"last model is {job.out / LAST}\n  fix: lower the learning rate, or look at "
                f"{job.objective_label}, and start anew with --fresh"
            )
        drawn = self._main and plot_losses(self._metrics, plot)
        return TrainResult(
            threshold=getattr(job.model.patcher, "threshold", None),
            held_out=self._held_out,
            best_bits_per_byte=self._best,
            model=job.out / BEST,
            plot=plot if drawn else None,
        )

    def _open_out(self, phases: list[Phase]) -> States:
        """Make the folder of the run, where all that will be written must have room."""
        out = self._job.out
        with file_errors(out, DataError):
            out.mkdir(parents=True, exist_ok=True)
        # Process 0 writes them; beside the others it may already remove what an older run left.
        for name in (BEST, LAST) if self._main else ():
            check_replaceable(out / name, MODEL_FILES)
        names = tuple(phase.name for phase in phases)
        return States(out / "state", names, self._settings.keep_states)

    def _restore(self, states: States, phases: list[Phase], *, fresh: bool) -> Found | None:
        """The state to go on from, all but what the backend holds; None for a new run."""
        model = self._job.model
        found = None if fresh else states.latest(self._report.note)
        if found is None:
            if self._main:
                self._forget(states)
            return None
        state = found.state
        check_same_settings(self._job.out, state, self._tables())
        self._put_back(state.rest, found.folder)
        if state.threshold is not None and isinstance(model.patcher, ThresholdPatcher):
            model.patcher.threshold = state.threshold
        torch.set_rng_state(state.generator)
        # States of older versions may hold a best score that is no number.
        self._best = state.best if is_score(state.best) else None
        self._saved = found.folder
        steps = {phase.name: phase.steps for phase in phases}
        ended = state.phase == phases[-1].name and state.step == steps[state.phase]
        finished = ended and state.scored
        if self._main:
            self._tidy(states)
            done = {SCORER: steps.get(SCORER, 0), PATCHES: 0} if state.phase == MODEL else {}
            done |= {PATCHES: 0} if self._alone and finished else {}
            unscored = None if state.scored else (state.phase, state.step)
            self._metrics.rewind({**done, state.phase: state.step}, unscored)
        if finished:
            self._report.note(f"already finished ({state.name}); --fresh trains anew")
        else:
            self._report.note(f"resumed at {state.name}")
        return attrs.evolve(found, state=attrs.evolve(state, rest={}))  # it may be a whole model

    def _forget(self, states: States) -> None:
        """Remove what an older run has left, but for its best model, which stays until a new one.

        Raises DataError, and removes nothing, if someone else's file lies beside its last model.
        """
        last = self._job.out / LAST
        with file_errors(last, DataError):
            # What editors keep counts here: it may be somebody's work, and would go with the model.
            found = {path.name for path in last.iterdir()} if last.exists() else set()
        if others := {name for name in found.difference(MODEL_FILES) if not is_dross(name)}:
            raise DataError(
                f"{last}: not removed, since it holds {', '.join(sorted(others))} beside the last "
                "model of an older run\n  fix: move it away, or choose another --out"
            )
        states.clear()
        self._metrics.rewind({})
        if last.exists():
            discard(last)
        self._tidy(states)

    def _tidy(self, states: States) -> None:
        """Remove what a run that was killed could not."""
        states.tidy()
        for name in (BEST, LAST):
            tidy_model(self._job.out / name)

    def _put_back(self, rest: Mapping[str, Tensor], folder: Path) -> None:
        """Copy the tensors of parts that a phase does not train into the model."""
        own = self._job.model.modules().state_dict()
        for name, tensor in rest.items():
            if name not in own or own[name].shape != tensor.shape:
                raise CheckpointError(f"{folder}: {name!r} does not fit the model of this config")
            own[name].copy_(tensor)

    def _tables(self) -> dict[str, Any]:
        """What must not change between the parts of a run."""
        train = {k: v for k, v in attrs.asdict(self._settings).items() if k not in FREE}
        text = {"text": self._data.digest, "order": ORDER}
        return {**self._job.tables, "train": train, **text}

    # -- phases ----------------------------------------------------------------------------------

    def _run_phase(self, phase: Phase, states: States, found: Found | None) -> None:
        self._backend = self._job.backend if phase.name == MODEL else self._scorer_backend
        backend, clock = self._backend, Clock()
        first = found.state.step if found is not None else 0
        if found is None and phase.name == MODEL:
            self._fix_patches()
        share = phase.passes // backend.world_size
        module = backend.start(
            phase.module,
            # Nothing here keeps these: they hold the whole weights, which a backend may spread.
            parameter_groups(phase.module, self._settings.weight_decay),
            clip=self._settings.clip,
            accumulate=share,
        )
        if found is not None:
            backend.load(found.folder)
        else:
            self._save(phase, 0, states)
        self._report.phase(phase.name, first, phase.steps)
        if found is not None and not found.state.scored:
            self._look_after(phase, first, states)
        for step in range(first, phase.steps):
            began = time.perf_counter()
            figures, size = self._step(phase, module, step)
            clock.add(size, time.perf_counter() - began)
            self._log(phase, step + 1, {**figures, "bytes_per_second": clock.speed})
            if self._is_due(self._settings.log_every, phase, step + 1):
                clock = Clock()
            self._look_after(phase, step + 1, states)
        if phase.name == SCORER:
            self._scorer_backend.release()

    def _step(self, phase: Phase, module: nn.Module, step: int) -> tuple[dict[str, float], int]:
        """One optimizer step: its figures (loss in nats a byte) and its bytes."""
        backend, device = self._backend, self._job.model.device
        numbers = range(step * phase.passes, (step + 1) * phase.passes)
        size = sum(phase.batches.size(number) for number in numbers)
        found: dict[int, dict[str, float]] = {}

        def run(index: int, batch: Batch) -> Tensor:
            loss, figures = module(batch, phase.generator(step, index))
            share = batch.scored / size
            figures = {"loss": float(loss.detach()), **figures}
            found[index] = {name: share * value for name, value in figures.items()}
            # The backend averages, yet batches of unequal size count by their bytes.
            return loss * (share * phase.passes)

        own = range(backend.rank, phase.passes, backend.world_size)
        batches = ((index, phase.batches[numbers[index]].to(device)) for index in own)
        backend.backward(partial(run, index, batch) for index, batch in batches)
        check_same_figures(found.values(), self._job.objective_label)
        sums: dict[str, float] = {}
        for index in own:
            for name, value in found[index].items():
                sums[name] = sums.get(name, 0.0) + value
        shared = backend.mean([*sums.values(), float(self._interrupts.asked)])
        self._stopping = shared.pop() > 0
        figures = {k: v * backend.world_size for k, v in zip(sums, shared, strict=True)}
        self._check_finite("loss", figures["loss"], phase, step)
        rate = phase.schedule.rate(step)
        norm = backend.step(rate)
        self._check_finite("gradient norm", norm, phase, step)
        return {**figures, "lr": rate, "grad_norm": norm}, size

    def _log(self, phase: Phase, done: int, figures: Mapping[str, float]) -> None:
        self._report.step(done, figures)
        if self._is_due(self._settings.log_every, phase, done):
            self._record(phase=phase.name, step=done, **figures)

    def _look_after(self, phase: Phase, done: int, states: States) -> None:
        """What happens between two steps: a score, a checkpoint, the end on request.

        Launchers wait for seconds, so a score is left to the resumed run when the end is asked for.
        """
        # A signal may come after the processes have agreed; then it counts from the next step on.
        stopping = self._stopping or (self._interrupts.asked and self._backend.world_size == 1)
        due = self._is_due(self._settings.validate_every, phase, done)
        scored = not due or (not stopping and self._score(phase, done))
        stopping = stopping or not scored
        if self._is_due(self._settings.checkpoint_every, phase, done) or stopping:
            self._save(phase, done, states, scored=scored)
        if stopping:
            raise RunError(
                f"interrupted at {phase.name} step {done}, which is saved in {self._job.out}; "
                "run the same command again to go on"
            )

    def _score(self, phase: Phase, done: int) -> bool:
        """Score what is trained; False if that was cut short, in all processes, by a signal."""
        try:
            self._validate(phase, done)
            if self._alone and done == phase.steps:
                self._write_scorer()
        except Stopped:
            return False
        return True

    def _until_asked(self, items: Iterable[T], backend: TrainingBackend) -> Iterator[T]:
        """The items; raises Stopped before the next one once any process was asked to stop.

        Every process must have as many items, since they agree before each.
        """
        for item in items:
            if backend.mean([float(self._interrupts.asked)])[0] > 0:
                raise Stopped
            yield item

    @staticmethod
    def _is_due(every: int, phase: Phase, done: int) -> bool:
        return done % every == 0 or done == phase.steps

    def _check_finite(self, what: str, value: float, phase: Phase, step: int) -> None:
        if math.isfinite(value):
            return
        good = f"the last good state is {self._saved}"
        if phase.name == MODEL and self._best is not None:
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

    # -- scores ----------------------------------------------------------------------------------

    def _fix_patches(self) -> None:
        """Calibrate the patcher where its threshold is not given.

        First its scorer is rounded to what is stored, so that training sees the patches of later
        use.
        """
        patcher, backend = self._job.model.patcher, self._scorer_backend  # the model's is not on
        with _kept_if_stopped(trainable_scorer(self._job.model)) as scorer:
            if scorer:
                round_parameters(scorer, self._dtype)
            if not self._job.calibrates or not isinstance(patcher, ThresholdPatcher):
                return
            target = self._settings.scorer.target_patch_bytes
            batches = self._until_asked(self._data.calibration, backend)
            found = calibrate(patcher, batches, target)
        patcher.threshold = of_first(backend, found.threshold)
        self._record(
            phase=PATCHES,
            step=0,
            threshold=found.threshold,
            mean_patch_bytes=found.mean_patch_bytes,
        )
        self._report.note(
            f"threshold {found.threshold:.4f} nats: patches of "
            f"{found.mean_patch_bytes:.2f} bytes on average"
        )

    def _write_scorer(self) -> None:
        """Finish a scorer-only run: calibrate and write the model that the final state is of."""
        self._fix_patches()
        self._write_model(BEST)

    def _validate(self, phase: Phase, step: int) -> None:
        with self._backend.whole():
            if phase.name == SCORER:
                self._validate_scorer(phase, step)
            else:
                self._validate_model(phase, step)

    def _validate_scorer(self, phase: Phase, step: int) -> None:
        scorer = trainable_scorer(self._job.model)
        if scorer is None or not self._data.valid:
            return
        batches = self._until_asked(self._data.valid, self._backend)
        held_out = evaluate_scorer(scorer.part, batches, self._job.model.scheme)
        self._check_finite("held-out score", held_out.bits_per_byte, phase, step - 1)
        if self._alone:
            self._held_out, self._best = held_out, held_out.bits_per_byte
        self._record(phase=SCORER, step=step, bits_per_byte=held_out.bits_per_byte)
        self._report.note(
            f"scorer step {step}: {held_out.bits_per_byte:.4f} held-out bits per byte"
        )

    def _validate_model(self, phase: Phase, step: int) -> None:
        """Score the model, and write it if it is the best so far, or else the last."""
        job, last = self._job, step == phase.steps
        if not self._data.valid:
            if last:
                self._write_model(BEST)
            return
        scores = validate(
            job.model,
            self._data.valid,
            self._data.prefixes,
            job.plugins,
            block_bytes=getattr(job.objective, "block_bytes", BLOCK_BYTES),
            between=partial(self._until_asked, backend=self._backend),
        )
        self._held_out = result = scores.held_out
        score = result.bits_per_byte
        better = is_score(score) and (self._best is None or score < self._best)
        # Processes of different machines may score apart, and all have to take part in a write.
        better = of_first(self._backend, float(better)) > 0
        self._record(phase=MODEL, step=step, **scores.record())
        if better:
            self._best = score
        if better or last:
            self._write_model(BEST if better else LAST)
        self._report.note(
            f"model step {step}: {scores.describe()}{', the best so far' if better else ''}"
        )

    # -- files -----------------------------------------------------------------------------------

    def _record(self, *, phase: str, step: int, **figures: Any) -> None:
        if self._main:
            self._metrics.write(phase=phase, step=step, **figures)

    def _write_model(self, name: str) -> None:
        job = self._job
        # In every process, since layers may be spread over them, and as long as they are gathered:
        # reading the weights lets them go.
        outputs = None if self._reloads else outputs_of(job.model)
        self._reloads = True
        weights = self._backend.weights()
        if not self._main:
            return
        whole = {**self._rest(weights), **weights}
        tensors = {
            key: tensor.to(self._dtype) if tensor.is_floating_point() else tensor
            for key, tensor in whole.items()
        }
        folder = job.out / name
        job.format.write(folder, model_config(job.model), tensors)
        if outputs is not None:
            check_written(folder, job.format, tensors)
            check_reloads(folder, job.format, job.plugins, whole, job.model, outputs)

    def _rest(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors that are not among the trained ones."""
        state = self._job.model.modules().state_dict()
        return {k: t.detach().cpu().contiguous() for k, t in state.items() if k not in trained}

    def _save(self, phase: Phase, step: int, states: States, *, scored: bool = True) -> None:
        state = TrainingState(
            scored=scored,
            phase=phase.name,
            step=step,
            threshold=getattr(self._job.model.patcher, "threshold", None),
            best=self._best,
            settings=self._tables(),
            rest=self._rest(phase.module.state_dict()),
        )
        backend = self._backend
        self._saved = states.save(
            state, backend.save, main=self._main, barrier=lambda: backend.mean([])
        )

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._settings.save_dtype)
        return dtype


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
