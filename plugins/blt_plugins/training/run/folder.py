"""The folder of a run: what it writes, what a resumed run goes on from, and what is tidied away.

``model/`` is the best model so far, ``model-last/`` the last one where that is another,
``state/PHASE-STEP/`` what a run goes on from, ``metrics.jsonl`` its log. Process 0 writes them; the
others take part where weights are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from blt_core.errors import CheckpointError, DataError
from blt_core.files import is_dross
from blt_core.protocols import ThresholdPatcher, TrainingBackend
from blt_core.storage.folders import MODEL_FILES, check_replaceable, file_errors
from blt_core.storage.tensors import model_config
from blt_plugins.training.objectives.losses import MODEL, PATCHES, SCORER
from blt_plugins.training.run.job import BEST, LAST, Job
from blt_plugins.training.run.metrics import Metrics, plot_losses
from blt_plugins.training.run.phases import Phase
from blt_plugins.training.run.rebuild import check_reloads, check_written, outputs_of
from blt_plugins.training.run.states import (
    Found,
    States,
    TrainingState,
    check_same_settings,
    discard,
    tidy_model,
)

#: Settings that may change when a run is resumed, since no step depends on them.
FREE = (
    *("out", "log_every", "checkpoint_every", "validate_every", "keep_states"),
    *("valid_drafts", "tensorboard"),
)


class RunFolder:
    """What one run writes, in all of its processes.

    text: what names the corpus and its order; a resumed run must share it. Nothing is read or
    written before ``resume``.
    """

    def __init__(self, job: Job, phases: Sequence[Phase], text: Mapping[str, Any]) -> None:
        self._job, self._phases, self._text = job, phases, text
        self._main = job.backend.rank == 0
        events = job.out / "tensorboard" if job.settings.tensorboard else None
        self._metrics = Metrics(job.out / "metrics.jsonl", events)
        #: The folder of the last state that was saved, or that the run goes on from.
        self.saved: Path | None = None
        # Whether a model that was written has been read again.
        self._reloads = False
        self._states: States

    # -- going on --------------------------------------------------------------------------------

    def resume(self, note: Callable[[str], None], *, fresh: bool) -> Found | None:
        """The state to go on from, put back but for what the backend holds; None for a new run.

        ``note`` is told of it. Raises OtherSettingsError if the state belongs to another
        configuration, DataError if something is in the way of what is to be written.
        """
        self._open()
        found = None if fresh else self._states.latest(note)
        if found is None:
            if self._main:
                self._forget()
            return None
        state = found.state
        check_same_settings(self._job.out, state, self._tables())
        self._put_back(state, found.folder)
        self.saved = found.folder
        finished = self._is_finished(state)
        if self._main:
            self._tidy()
            self._rewind_metrics(state, finished=finished)
        if finished:
            note(f"already finished ({state.name}); --fresh trains anew")
        else:
            note(f"resumed at {state.name}")
        return attrs.evolve(found, state=attrs.evolve(state, rest={}))  # it may be a whole model

    def _open(self) -> None:
        """Make the folder, where all that will be written must have room."""
        job = self._job
        with file_errors(job.out, DataError):
            job.out.mkdir(parents=True, exist_ok=True)
        # Process 0 writes them; beside the others it may already remove what an older run left.
        for name in (BEST, LAST) if self._main else ():
            check_replaceable(job.out / name, MODEL_FILES)
        names = tuple(phase.name for phase in self._phases)
        self._states = States(job.out / "state", names, job.settings.keep_states)

    def _is_finished(self, state: TrainingState) -> bool:
        last = self._phases[-1]
        return (state.phase, state.step) == (last.name, last.steps) and state.scored

    def _put_back(self, state: TrainingState, folder: Path) -> None:
        """Give the model what a state holds of it: parts that its phase does not train."""
        model = self._job.model
        own = model.module_dict().state_dict()
        for name, tensor in state.rest.items():
            if name not in own or own[name].shape != tensor.shape:
                raise CheckpointError(f"{folder}: {name!r} does not fit the model of this config")
            own[name].copy_(tensor)
        if state.threshold is not None and isinstance(model.patcher, ThresholdPatcher):
            model.patcher.threshold = state.threshold
        torch.set_rng_state(state.generator)

    def _rewind_metrics(self, state: TrainingState, *, finished: bool) -> None:
        """Take out of the log what will be logged again."""
        steps = {phase.name: phase.steps for phase in self._phases}
        done = {SCORER: steps.get(SCORER, 0), PATCHES: 0} if state.phase == MODEL else {}
        done |= {PATCHES: 0} if self._phases[-1].name == SCORER and finished else {}
        unscored = None if state.scored else (state.phase, state.step)
        self._metrics.rewind({**done, state.phase: state.step}, unscored)

    def _forget(self) -> None:
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
        self._states.clear()
        self._metrics.rewind({})
        if last.exists():
            discard(last)
        self._tidy()

    def _tidy(self) -> None:
        """Remove what a run that was killed could not."""
        self._states.tidy()
        for name in (BEST, LAST):
            tidy_model(self._job.out / name)

    def _tables(self) -> dict[str, Any]:
        """What must not change between the parts of a run."""
        settings = attrs.asdict(self._job.settings)
        train = {key: value for key, value in settings.items() if key not in FREE}
        return {**self._job.tables, "train": train, **self._text}

    # -- writing ---------------------------------------------------------------------------------

    def save(
        self,
        phase: Phase,
        step: int,
        backend: TrainingBackend,
        *,
        best: float | None,
        scored: bool = True,
    ) -> None:
        """Save the state after ``step`` steps of a phase, in every process.

        best: the best score so far. scored: False if the scores of this step are yet to be taken.
        """
        state = TrainingState(
            scored=scored,
            phase=phase.name,
            step=step,
            threshold=getattr(self._job.model.patcher, "threshold", None),
            best=best,
            settings=self._tables(),
            rest=self._rest(phase.module.state_dict()),
        )
        self.saved = self._states.save(
            state, backend.save, main=self._main, barrier=lambda: backend.mean([])
        )

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
        whole = {**self._rest(weights), **weights}
        tensors = {
            key: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for key, tensor in whole.items()
        }
        folder = job.out / name
        job.format.write(folder, model_config(job.model), tensors)
        if outputs is not None:
            check_written(folder, job.format, tensors)
            check_reloads(folder, job.format, job.plugins, whole, job.model, outputs)

    def _rest(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors that are not among the trained ones."""
        state = self._job.model.module_dict().state_dict()
        return {k: t.detach().cpu().contiguous() for k, t in state.items() if k not in trained}

    def plot(self) -> Path | None:
        """Draw the losses; None where that is another process's task, or matplotlib is missing."""
        path = self._job.out / "losses.png"
        return path if self._main and plot_losses(self._metrics, path) else None

    def close(self) -> None:
        """Write out what is buffered."""
        self._metrics.close()
