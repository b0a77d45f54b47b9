"""The training loop: phases and their steps, with exact resume.

A step's data and random numbers are functions of the seed and the step's number, and the state
holds all that steps change. So a run that was stopped goes on bit for bit where it was saved. A
step has the same passes in any number of processes, which only share them out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from torch import Tensor, nn

from blt_core.errors import RunError
from blt_core.protocols import TrainingBackend
from blt_plugins.training.backends.parameters import parameter_groups
from blt_plugins.training.backends.torch import scorer_backend
from blt_plugins.training.data.load import Data, load_data, read_index
from blt_plugins.training.data.order import ORDER
from blt_plugins.training.data.windows import Batch
from blt_plugins.training.objectives.figures import check_same_figures
from blt_plugins.training.objectives.losses import MODEL, SCORER
from blt_plugins.training.run.folder import RunFolder
from blt_plugins.training.run.interrupts import Interrupts, Stopped
from blt_plugins.training.run.job import BEST, LAST, Job, TrainResult
from blt_plugins.training.run.judge import Judge, is_score
from blt_plugins.training.run.malloc import keep_freed_memory
from blt_plugins.training.run.phases import Phase, make_phases
from blt_plugins.training.run.report import Report
from blt_plugins.training.run.resume import resume, settings_of
from blt_plugins.training.run.states import Found
from blt_plugins.training.run.together import Together, named_loss


class Trainer:
    """Runs a job; raises DataError, when it is made, where the corpus is unfit.

    What a run keeps on the disk is :class:`RunFolder`'s, its scores are :class:`Judge`'s; what it
    goes on from, :func:`resume` finds.
    """

    def __init__(self, job: Job, report: Report) -> None:
        self._job, self._report, self._settings = job, report, job.settings
        self._scorer_backend = scorer_backend(job.backend, job.model.scheme)
        self._interrupts = Interrupts(report.note)
        self._stopping = False
        with ExitStack() as ends:
            ends.callback(self._scorer_backend.close)  # a group that nobody else would leave
            self._prepare()
            ends.pop_all()

    def _prepare(self) -> None:
        """All that reads or looks at files."""
        job, report = self._job, self._report
        self._check_processes()
        self._data = self._load()
        self._phases = make_phases(
            job.model,
            job.objective,
            job.settings,
            self._data.documents,
            self._data.windows,
            label=job.objective_label,
        )
        self._alone = self._phases[-1].name == SCORER
        text = {"text": self._data.digest, "order": ORDER}
        names = [phase.name for phase in self._phases]
        self._folder = RunFolder(job, names, settings_of(job, text))
        self._judge = Judge(job, self._data, self._folder, report, self._interrupts)

    def _check_processes(self) -> None:
        """Raise RunError where the backend counts other processes than the launcher has told."""
        backends = self._job.backend, self._scorer_backend
        ours, told = (f"{each.rank} of {each.world_size}" for each in backends)
        if ours != told:
            raise RunError(
                f"the training backend says that this is process {ours}, and the environment "
                f"(RANK, WORLD_SIZE) {told}\n"
                "  fix: start the run with a launcher that sets these, such as torchrun"
            )

    def _load(self) -> Data:
        """Process 0 indexes the corpus, and the others read what it has kept."""
        job, backend = self._job, self._scorer_backend
        together = Together(backend, lambda: False, "the corpus")
        with together.work():
            together.first_alone(lambda: read_index(job.corpus, job.settings))
            return load_data(
                job.corpus,
                job.settings,
                job.model,
                rank=backend.rank,
                world_size=backend.world_size,
            )

    def run(self, *, fresh: bool = False) -> TrainResult:
        """Train to the end, going on from a saved state unless ``fresh``.

        Raises RunError if the loss is no number any more, or after an interrupt; what was saved
        is complete. Raises OtherSettingsError if the state belongs to another configuration,
        DataError if something else is in the way of what is to be written.
        """
        job = self._job
        keep_freed_memory()
        try:
            self._report.note(self._data.summary)
            found = self._resume(fresh=fresh)
            with self._interrupts:
                for phase in self._phases:
                    if found is not None and found.state.phase != phase.name:
                        continue  # it was over when the state was saved
                    self._run_phase(phase, found)
                    found = None
                # No process leaves while another still waits for it.
                self._backend_of(self._phases[-1]).mean([])
        except Stopped:
            last = self._folder.saved
            saved = f"what was saved ({last})" if last else "nothing, which"
            raise RunError(
                f"interrupted in the calibration, before a step of {phase.name}; {saved} is "
                "complete; run the same command again to go on"
            ) from None
        finally:
            # Last the writes, which other processes must not wait for. The model's backend before
            # the group: DDP would end a group that it alone holds with Python's lock in its hands.
            with self._interrupts, ExitStack() as ends:
                ends.callback(self._folder.close)
                ends.callback(self._scorer_backend.close)
                ends.callback(job.backend.close)
        return self._end()

    def _resume(self, *, fresh: bool) -> Found | None:
        together = Together(self._scorer_backend, lambda: False, "start of the run")
        with together.work():
            found = resume(
                self._job, self._phases, self._folder, self._report.note, together, fresh=fresh
            )
        # States of older versions may hold a best score that is no number.
        if found is not None and is_score(found.state.best):
            self._judge.best = found.state.best
        return found

    def _end(self) -> TrainResult:
        job, judge = self._job, self._judge
        if judge.best is None and self._data.valid.rounds:
            raise RunError(
                f"{job.out / BEST}: not written, since no held-out score was a finite number; the "
                f"last model is {job.out / LAST}\n  fix: lower the learning rate, or look at "
                f"{job.objective_label}, and start anew with --fresh"
            )
        return TrainResult(
            threshold=getattr(job.model.patcher, "threshold", None),
            held_out=judge.held_out,
            best_bits_per_byte=judge.best,
            model=job.out / BEST,
            plot=self._folder.plot(),
        )

    def _backend_of(self, phase: Phase) -> TrainingBackend:
        """The job's backend for the model alone: a run without one never starts it."""
        return self._job.backend if phase.name == MODEL else self._scorer_backend

    def _run_phase(self, phase: Phase, found: Found | None) -> None:
        backend = self._backend_of(phase)
        clock, first = Clock(), found.state.step if found is not None else 0
        if found is None and phase.name == MODEL:
            self._judge.fix_patches(self._scorer_backend)  # the model's is not on
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
            self._folder.save(phase, 0, backend, best=self._judge.best)
        self._report.phase(phase.name, first, phase.steps)
        if found is not None and not found.state.scored:
            self._look_after(phase, first, backend)
        for step in range(first, phase.steps):
            began = time.perf_counter()
            figures, size = self._step(phase, module, step, backend)
            clock.add(size, time.perf_counter() - began)
            self._log(phase, step + 1, {**figures, "bytes_per_second": clock.speed})
            if self._is_due(self._settings.log_every, phase, step + 1):
                clock = Clock()
            self._look_after(phase, step + 1, backend)
        if phase.name == SCORER:
            self._scorer_backend.release()

    def _step(
        self, phase: Phase, module: nn.Module, step: int, backend: TrainingBackend
    ) -> tuple[dict[str, float], int]:
        """One optimizer step: its figures (loss in nats a byte) and its bytes."""
        device = self._job.model.device
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
        with named_loss(f"step {step + 1}"):
            backend.backward(partial(run, index, batch) for index, batch in batches)
        check_same_figures(found.values(), self._job.objective_label)
        sums: dict[str, float] = {}
        for index in own:
            for name, value in found[index].items():
                sums[name] = sums.get(name, 0.0) + value
        background = self._folder.background
        own_news = float(self._interrupts.asked), *background.news()
        with named_loss(f"step {step + 1}"):
            shared = backend.mean([*sums.values(), *own_news])
        means, asked, *news = shared[: len(sums)], *shared[len(sums) :]
        self._stopping = asked > 0
        background.heard(news)
        figures = {k: v * backend.world_size for k, v in zip(sums, means, strict=True)}
        self._judge.check_finite("loss", figures["loss"], phase, step)
        rate = phase.schedule.rate(step)
        norm = backend.step(rate)
        self._judge.check_finite("gradient norm", norm, phase, step)
        return {**figures, "lr": rate, "grad_norm": norm}, size

    def _log(self, phase: Phase, done: int, figures: Mapping[str, float]) -> None:
        self._report.step(done, figures)
        if self._is_due(self._settings.log_every, phase, done):
            self._folder.record(phase=phase.name, step=done, **figures)

    def _look_after(self, phase: Phase, done: int, backend: TrainingBackend) -> None:
        """What happens between two steps: a score, a checkpoint, the end on request.

        Launchers wait for seconds, so a score is left to the resumed run when the end is asked for.
        """
        judge, settings = self._judge, self._settings
        # A signal may come after the processes have agreed; then it counts from the next step on.
        stopping = self._stopping or (self._interrupts.asked and backend.world_size == 1)
        due = self._is_due(settings.validate_every, phase, done)
        scored = not due or (not stopping and judge.score(phase, done, backend, alone=self._alone))
        stopping = stopping or not scored
        if self._is_due(settings.checkpoint_every, phase, done) or stopping:
            wait = stopping or done == phase.steps
            self._folder.save(phase, done, backend, best=judge.best, scored=scored, wait=wait)
        if stopping:
            raise RunError(
                f"interrupted at {phase.name} step {done}, which is saved in {self._job.out}; "
                "run the same command again to go on"
            )

    @staticmethod
    def _is_due(every: int, phase: Phase, done: int) -> bool:
        return done % every == 0 or done == phase.steps


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
