"""The folder of a run: what it writes, keeps and tidies away.

``model/`` is the best model so far, ``model-last/`` the last one where that is another,
``state/PHASE-STEP/`` what a run goes on from, ``metrics.jsonl`` its log. Process 0 writes them; the
others take part where weights are gathered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blt_core.errors import DataError
from blt_core.files import is_dross
from blt_core.protocols import BackgroundSaver, TrainingBackend
from blt_core.storage.folders import MODEL_FILES, check_replaceable, file_errors
from blt_core.storage.tensors import model_config
from blt_plugins.training.run.background import BackgroundStates
from blt_plugins.training.run.job import BEST, LAST, Job
from blt_plugins.training.run.metrics import Metrics, plot_losses
from blt_plugins.training.run.phases import Phase
from blt_plugins.training.run.rebuild import check_reloads, check_written, outputs_of
from blt_plugins.training.run.state_files import TrainingState
from blt_plugins.training.run.states import States, discard, tidy_model
from blt_plugins.training.run.together import Together


class RunFolder:
    """What one run writes, in all of its processes.

    phases: their names. settings: what each state tells of the run that it is of. Nothing is read
    or written before the folder is opened.
    """

    def __init__(self, job: Job, phases: Sequence[str], settings: Mapping[str, Any]) -> None:
        self._job, self._phases, self.settings = job, tuple(phases), settings
        self._main = job.backend.rank == 0
        self._drawn = job.out / "losses.png"
        events = job.out / "tensorboard" if job.settings.tensorboard else None
        self._metrics = Metrics(job.out / "metrics.jsonl", events)
        #: The folder of the last state that was saved, or that the run goes on from.
        self.saved: Path | None = None
        # Whether a model that was written has been read again.
        self._reloads = False
        self.states: States
        self.background: BackgroundStates
        self._ending = ExitStack()
        self._ending.callback(self._metrics.close)

    def open(self) -> None:
        """Make the folder, where all that will be written must have room, or raise DataError."""
        job = self._job
        with file_errors(job.out, DataError):
            job.out.mkdir(parents=True, exist_ok=True)
        # Process 0 writes them; beside the others it may already remove what an older run left.
        for name in (BEST, LAST) if self._main else ():
            check_replaceable(job.out / name, MODEL_FILES)
        self.states = States(job.out / "state", self._phases, job.settings.keep_states)
        backend = job.backend
        self.background = BackgroundStates(
            self.states, backend.rank, backend.world_size, self._note_saved
        )
        self._ending.callback(self.background.close)

    def go_on(
        self, state: Path, logged: Mapping[str, int], unscored: tuple[str, int] | None
    ) -> None:
        """Go on from a state: tidy up, and cut the log back (see :meth:`Metrics.rewind`)."""
        self.saved = state
        if self._main:
            self._tidy()
            self._metrics.rewind(logged, unscored)

    def forget(self) -> None:
        """Remove what an older run has left, but for its best model, which stays until a new one.

        Raises DataError, and removes nothing, if someone else's file lies beside its last model.
        """
        if not self._main:
            return
        last = self._job.out / LAST
        with file_errors(last, DataError):
            # What editors keep counts here: it may be somebody's work, and would go with the model.
            found = {path.name for path in last.iterdir()} if last.exists() else set()
        if others := {name for name in found.difference(MODEL_FILES) if not is_dross(name)}:
            raise DataError(
                f"{last}: not removed, since it holds {', '.join(sorted(others))} beside the last "
                "model of an older run\n  fix: move it away, or choose another --out"
            )
        self.states.clear()
        self._metrics.rewind({})
        self._drawn.unlink(missing_ok=True)
        if last.exists():
            discard(last)
        self._tidy()

    def _tidy(self) -> None:
        """Remove what a run that was killed could not."""
        self.states.tidy()
        for name in (BEST, LAST):
            tidy_model(self._job.out / name)

    def save(
        self,
        phase: Phase,
        step: int,
        backend: TrainingBackend,
        *,
        best: float | None,
        scored: bool = True,
        wait: bool = False,
    ) -> None:
        """Save the state after ``step`` steps of a phase, in every process.

        best: the best score so far. scored: False if the scores of this step are yet to be taken.
        wait: whether the state must be there when this returns, though the run saves in the
        background. Raises RunError where the save before has failed.
        """
        state = TrainingState(
            scored=scored,
            phase=phase.name,
            step=step,
            threshold=getattr(self._job.model.patcher, "threshold", None),
            best=best,
            settings=self.settings,
            rest=self._untrained(phase.module.state_dict()) if self._main else {},
        )
        together = Together(backend, lambda: False, f"state of {state.name}")

        def agree(failed: bool) -> None:  # noqa: FBT001 -- see Agree
            together.agree(failed=failed)

        self.background.finish()
        if self._job.settings.async_states and not wait and isinstance(backend, BackgroundSaver):
            self.background.save(state, backend.stage, agree)
        else:
            self.saved = self.states.save(
                state,
                backend.save,
                rank=backend.rank,
                processes=backend.world_size,
                agree=agree,
            )

    def _note_saved(self, folder: Path) -> None:
        self.saved = folder

    def record(self, *, phase: str, step: int, **figures: Any) -> None:
        """Add a line to the log."""
        if self._main:
            self._metrics.write(phase=phase, step=step, **figures)

    def write_model(self, name: str, backend: TrainingBackend) -> None:
        """Write the model under ``name``, in every process; the first one is read again."""
        job = self._job
        # In every process, since layers may be spread over them, and as long as they are gathered:
        # reading the weights lets them go.
        outputs = None if self._reloads else outputs_of(job.model)
        self._reloads = True
        weights = backend.weights()
        if not self._main:
            return
        dtype: torch.dtype = getattr(torch, job.settings.save_dtype)
        rest = {k: t.cpu().contiguous() for k, t in self._untrained(weights).items()}
        whole = {**rest, **weights}
        tensors = {
            key: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for key, tensor in whole.items()
        }
        folder = job.out / name
        job.format.write(folder, model_config(job.model), tensors)
        if outputs is not None:
            check_written(folder, job.format, tensors)
            check_reloads(folder, job.format, job.plugins, whole, job.model, outputs)

    def _untrained(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors that are not among the trained ones, where they are."""
        state = self._job.model.module_dict().state_dict()
        return {name: t.detach() for name, t in state.items() if name not in trained}

    def plot(self) -> Path | None:
        """Draw the losses, if asked to; None if not, in other processes, and without matplotlib."""
        wanted = self._main and self._job.settings.plot
        return self._drawn if wanted and plot_losses(self._metrics, self._drawn) else None

    def close(self) -> None:
        """Write out what is buffered, and end a save in the background."""
        self._ending.close()
