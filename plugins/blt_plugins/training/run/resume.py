"""Going on from a saved state: which one, whether it is of this run, and what is put back.

The backend puts back its own share (weights, optimizer) once the phase of the state begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from blt_core.errors import CheckpointError, RunError
from blt_core.model import Model
from blt_core.protocols import ThresholdPatcher
from blt_plugins.training.objectives.losses import MODEL, PATCHES, SCORER
from blt_plugins.training.run.folder import RunFolder
from blt_plugins.training.run.job import Job
from blt_plugins.training.run.phases import Phase
from blt_plugins.training.run.state_files import TrainingState
from blt_plugins.training.run.states import Found
from blt_plugins.training.run.together import Together

#: Settings that may change when a run is resumed, since no step depends on them.
FREE = (
    *("out", "log_every", "checkpoint_every", "validate_every", "keep_states"),
    *("async_states", "valid_drafts", "tensorboard", "plot"),
)


def settings_of(job: Job, text: Mapping[str, Any]) -> dict[str, Any]:
    """What must not change between the parts of a run. text: what names the corpus, its order."""
    settings = attrs.asdict(job.settings)
    train = {key: value for key, value in settings.items() if key not in FREE}
    return {**job.tables, "train": train, **text}


def resume(
    job: Job,
    phases: Sequence[Phase],
    folder: RunFolder,
    note: Callable[[str], None],
    together: Together,
    *,
    fresh: bool,
) -> Found | None:
    """The state to go on from, put back but for what the backend holds; None for a new run.

    The same in all processes, which check it ``together``, within its work.
    ``note`` is told of it. Raises OtherSettingsError if the state belongs to another configuration,
    DataError if something is in the way of what is to be written.
    """
    folder.open()
    found = None
    if not fresh:
        found = folder.states.latest(
            note, rank=together.rank, processes=together.processes, tell=together.tell
        )
    if found is None:
        folder.forget()
        return None
    state = found.state
    check_same_settings(job.out, state, folder.settings)
    _put_back(job.model, state, found.folder)
    last = phases[-1]
    finished = (state.phase, state.step) == (last.name, last.steps) and state.scored
    folder.go_on(found.folder, *_already_logged(state, phases, finished=finished))
    if finished:
        note(f"already finished ({state.name}); --fresh trains anew")
    else:
        note(f"resumed at {state.name}")
    return attrs.evolve(found, state=attrs.evolve(state, rest={}))  # it may be a whole model


def _put_back(model: Model, state: TrainingState, folder: Path) -> None:
    """Give the model what a state holds of it: parts that its phase does not train."""
    own = model.module_dict().state_dict()
    for name, tensor in state.rest.items():
        if name not in own or own[name].shape != tensor.shape:
            raise CheckpointError(f"{folder}: {name!r} does not fit the model of this config")
        own[name].copy_(tensor)
    if state.threshold is not None and isinstance(model.patcher, ThresholdPatcher):
        model.patcher.threshold = state.threshold
    torch.set_rng_state(state.generator)


def _already_logged(
    state: TrainingState, phases: Sequence[Phase], *, finished: bool
) -> tuple[dict[str, int], tuple[str, int] | None]:
    """The steps of each phase that stay in the log, and the one whose scores do not."""
    steps = {phase.name: phase.steps for phase in phases}
    done = {SCORER: steps.get(SCORER, 0), PATCHES: 0} if state.phase == MODEL else {}
    done |= {PATCHES: 0} if phases[-1].name == SCORER and finished else {}
    unscored = None if state.scored else (state.phase, state.step)
    return {**done, state.phase: state.step}, unscored


def check_same_settings(folder: Path, state: TrainingState, settings: Mapping[str, Any]) -> None:
    """Raise RunError that lists the settings in which a state and a configuration differ."""
    before, now = _flat(state.settings), _flat(settings)
    differences = [
        f"{key}: {_show(before, key)} there, {_show(now, key)} now"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        raise OtherSettingsError(
            f"{folder}: this run was started with another configuration:\n{lines}\n"
            "  fix: restore these settings, choose another --out, or start anew with --fresh"
        )


class OtherSettingsError(RunError):
    """A run's folder belongs to another configuration."""

    exit_code = 2


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def _show(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "not set"
