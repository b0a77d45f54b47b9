"""Where DeepSpeed's state is written, and into which processes and stages it can be read."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import attrs

from blt_core.errors import CheckpointError
from blt_core.files import read_json
from blt_plugins.deepspeed.internals import convert_to_universal

#: DeepSpeed writes into a folder of this name within the one it is given: this is that one.
TAG = "."
TOPOLOGY = "topology.json"
#: Stages whose optimizer states can be converted into each other; others only into themselves.
ALIKE = frozenset({1, 2})


@attrs.frozen
class Topology:
    """What a state depends on: ZeRO stage, number of processes, weight_dtype of the weights."""

    stage: int
    world_size: int
    weight_dtype: str

    def write(self, folder: Path) -> None:
        """Note it beside the state; its file is the last to be written."""
        text = json.dumps(attrs.asdict(self), indent=2)
        (folder / TOPOLOGY).write_text(text + "\n", encoding="utf-8")

    def __str__(self) -> str:
        plural = "es" if self.world_size > 1 else ""
        return f"stage {self.stage}, {self.world_size} process{plural}, {self.weight_dtype}"


def read_topology(folder: Path) -> Topology:
    """What the state in ``folder`` was written by. Raises CheckpointError if there is none."""
    path = folder / TOPOLOGY
    try:
        found = read_json(path)
        return Topology(**{field.name: found[field.name] for field in attrs.fields(Topology)})
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}: this is no state of the training backend 'deepspeed'\n"
            "  fix: go on with the backend that wrote it, or start a new run from its weights, "
            "with the folder of the trained model as [run] checkpoint"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error


def needs_conversion(saved: Topology, now: Topology, folder: Path) -> bool:
    """Whether DeepSpeed can read the state only once it is converted.

    Raises CheckpointError where it cannot at all.
    """
    if saved.weight_dtype == now.weight_dtype:
        if saved == now or saved.stage == now.stage == 0:
            return False
        if saved.stage == now.stage or {saved.stage, now.stage} <= ALIKE:
            return True
    raise CheckpointError(
        f"{folder}: written with {saved}; it cannot go on with {now}\n"
        f"  fix: set stage = {saved.stage} and weight_dtype = {saved.weight_dtype!r} in "
        "[training_backend]; or start a new run from the weights alone, with the folder of the "
        "trained model as [run] checkpoint"
    )


@contextmanager
def converted(folder: Path, *, first: bool, barrier: Any) -> Iterator[Path]:
    """A folder, for the time of the block, with the state in DeepSpeed's universal format.

    It lies within ``folder``, which all processes see. first: whether this process converts;
    barrier: waits for all of them. Raises CheckpointError if the conversion fails.
    """
    scratch = folder / ".universal"
    failure = ""
    if first:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        failure = _convert(folder, scratch / "step")
    barrier()
    try:
        if not (scratch / "step").is_dir() or failure:
            raise CheckpointError(f"{folder}: DeepSpeed cannot convert this state\n{failure}")
        yield scratch
        barrier()
    finally:
        if first:
            shutil.rmtree(scratch, ignore_errors=True)


def _convert(folder: Path, output: Path) -> str:
    """Run DeepSpeed's converter; what went wrong, or nothing."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            convert_to_universal(folder, output)
    except Exception as error:  # noqa: BLE001 -- whatever is wrong in the files
        return f"{type(error).__name__}: {error}"
    return ""
