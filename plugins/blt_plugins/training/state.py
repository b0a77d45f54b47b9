"""The state of an unfinished run: ``OUT/state/`` with tensors and their description, no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blt_core.checkpoint import check_replaceable, current_folder, replace_folder
from blt_core.errors import CheckpointError, RunError

STATE_FILES = DESCRIPTION, TENSORS = ("state.json", "tensors.safetensors")
VERSION = 1


@attrs.frozen
class TrainingState:
    """All that a run needs to go on as if it had never stopped.

    phase, step: the next step to take. threshold: of the patcher, once calibrated. best: the best
    held-out bits per byte so far. settings: the tables that the run was started with. model,
    optimizer: tensors by name. generator: torch's global random state.
    """

    phase: str
    step: int
    threshold: float | None
    best: float | None
    settings: Mapping[str, Any]
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    generator: Tensor = attrs.field(factory=torch.get_rng_state)


def save_state(folder: Path, state: TrainingState) -> None:
    """Write ``state``; until all of it is on the disk the former one stays.

    Raises DataError if something else has that name, RunError if it cannot be written.
    """
    tensors = {
        **{f"model/{name}": tensor for name, tensor in state.model.items()},
        **{f"optimizer/{name}": tensor for name, tensor in state.optimizer.items()},
        "generator": state.generator,
    }
    description = {
        "version": VERSION,
        "phase": state.phase,
        "step": state.step,
        "threshold": state.threshold,
        "best": state.best,
        "settings": state.settings,
    }
    with replace_folder(folder, STATE_FILES) as fresh:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, fresh / TENSORS)
        (fresh / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")


def load_state(folder: Path) -> TrainingState | None:
    """The state in ``folder``; None if there is none.

    Raises CheckpointError if it is damaged, DataError if something else has that name.
    """
    check_replaceable(folder, STATE_FILES)
    current = current_folder(folder)
    if not (current / DESCRIPTION).exists():
        return None
    try:
        description = json.loads((current / DESCRIPTION).read_text(encoding="utf-8"))
        tensors = load_file(current / TENSORS)
        if description["version"] != VERSION:
            raise CheckpointError(
                f"{folder}: written by another version of blt (state version "
                f"{description['version']}, this one reads {VERSION}); start anew with --fresh"
            )
        fields = {k: description[k] for k in ("phase", "step", "threshold", "best", "settings")}
        return TrainingState(
            **fields,
            model=_below("model/", tensors),
            optimizer=_below("optimizer/", tensors),
            generator=tensors["generator"],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the training state is damaged ({error}); start anew with --fresh"
        ) from error


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


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
