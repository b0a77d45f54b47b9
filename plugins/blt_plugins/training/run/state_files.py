"""The files of one saved state: what is written into its folder, and whether that is still there.

Its description, ``state.json``, tells size and checksum of every other file, and its own checksum.
Processes share out the work of checksums: by the files' sizes, so that their shares are even.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blt_core.errors import CheckpointError, RunError
from blt_core.files import is_stray, read_json
from blt_core.storage.folders import file_errors, flush, flush_all
from blt_core.storage.tensors import unshared
from blt_plugins.training.data.shares import deal

T = TypeVar("T")

VERSION = 2
DESCRIPTION, TENSORS = "state.json", "rest.safetensors"
#: What each process notes of the files that it sums, until all are in the description.
_SUMS = "sums-{}.json"
#: Bytes that a checksum reads at once.
_CHUNK = 1 << 24
#: What a description consists of, beside its version and its checksum.
_NUMBER = (int, float, type(None))
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "phase": str, "step": int, "threshold": _NUMBER, "best": _NUMBER, "settings": dict,
    "files": dict,
}  # fmt: skip
#: What a damaged state raises when it is read.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, SafetensorError)

#: Tells the other processes a text; gives the text of each, in the order of their ranks.
Tell = Callable[[str], Sequence[str]]


@attrs.frozen(kw_only=True)
class TrainingState:
    """All that a run needs to go on as if it had never stopped, beside what the backend saves.

    phase, step: the next step to take. threshold: of the patcher, once calibrated. best: the best
    held-out bits per byte so far. settings: the tables that the run was started with. rest: tensors
    of the parts that the phase does not train, by name. generator: torch's global random state.
    scored: False if the run was stopped before the scores of this step, which are yet to be taken.
    """

    phase: str
    step: int
    threshold: float | None
    best: float | None
    settings: Mapping[str, Any]
    rest: Mapping[str, Tensor]
    generator: Tensor = attrs.field(factory=torch.get_rng_state)
    scored: bool = True

    @property
    def name(self) -> str:
        """How the state is told in words."""
        return f"{self.phase} step {self.step}"

    @property
    def folder_name(self) -> str:
        """The name of its folder."""
        return f"{self.phase}-{self.step:08}"


# -- writing -------------------------------------------------------------------------------------


def write_rest(folder: Path, state: TrainingState) -> Path:
    """Write the tensors that are not the backend's; returns their file."""
    tensors = {**state.rest, "generator": state.generator}
    kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(unshared(kept), folder / TENSORS)
    return folder / TENSORS


def describe(folder: Path, state: TrainingState, processes: int) -> None:
    """Write the description, the last of the files, for it tells of all others; flush them."""
    files = _summed(folder, processes)
    description = {
        "version": VERSION,
        "phase": state.phase,
        "step": state.step,
        "threshold": state.threshold,
        "best": state.best,
        "settings": state.settings,
        "scored": state.scored,
        "files": files,
    }
    text = json.dumps({**description, "checksum": _own_checksum(description)}, indent=1)
    (folder / DESCRIPTION).write_text(text, encoding="utf-8")
    flush_all(folder)


def sum_share(folder: Path, rank: int, processes: int) -> None:
    """Note sizes and checksums of this process's share of the files of a state."""
    with file_errors(folder, RunError):
        sizes = {str(p.relative_to(folder)): p.stat().st_size for p in _files(folder)}
        own = _share(sizes, rank, processes)
        _note_sums(folder, rank, (folder / name for name in own))


def sum_written(folder: Path, rank: int, paths: Iterable[Path]) -> None:
    """Flush files that this process has written, and note their sizes and checksums."""
    with file_errors(folder, RunError):
        paths = list(paths)
        for path in paths:
            flush(path)
        _note_sums(folder, rank, paths)


def _note_sums(folder: Path, rank: int, paths: Iterable[Path]) -> None:
    found = {str(path.relative_to(folder)): _size_and_checksum(path) for path in paths}
    (folder / _SUMS.format(rank)).write_text(json.dumps(found), encoding="utf-8")


def _share(sizes: Mapping[str, int], rank: int, processes: int) -> list[str]:
    """The files of a state that a process sums."""
    names = sorted(sizes)
    return deal(names, [sizes[name] for name in names], processes)[rank]


def _files(folder: Path) -> list[Path]:
    """Those of a state, but for notes and strays, which may be gone before they are checked."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not is_stray(path.name) and not path.match(_SUMS.format("*"))
    ]


def _summed(folder: Path, processes: int) -> dict[str, list[int]]:
    """Sizes and checksums of all files, by name: as noted, or else taken; the notes are removed.

    On a shared file system processes may see other listings for a while.
    """
    noted: dict[str, list[int]] = {}
    for path in (folder / _SUMS.format(rank) for rank in range(processes)):
        noted |= read_json(path)
        path.unlink()
    names = {str(path.relative_to(folder)): path for path in _files(folder)}
    if missing := noted.keys() - names.keys():
        raise RunError(f"{folder}: {', '.join(sorted(missing))} is not seen in process 0")
    return {name: noted.get(name) or _size_and_checksum(path) for name, path in names.items()}


def _size_and_checksum(path: Path) -> list[int]:
    return [path.stat().st_size, _checksum(path)]


# -- reading -------------------------------------------------------------------------------------


def read(folder: Path, rank: int, processes: int, tell: Tell) -> TrainingState:
    """The state of a folder, once the processes have checked all of its files, each its share.

    Raises ValueError, with the same message in all of them, where any has found damage;
    CheckpointError for a state of another version.
    """

    def together(work: Callable[[], T]) -> T:
        try:
            found, problem = work(), ""
        except _DAMAGE as error:
            found, problem = None, str(error) or type(error).__name__
        if problems := [each for each in dict.fromkeys(tell(problem)) if each]:
            raise ValueError("; ".join(problems))
        return found  # type: ignore[return-value]

    description = together(lambda: _read_description(folder))
    together(lambda: _check_share(folder, description["files"], rank, processes))
    tensors = together(lambda: load_file(folder / TENSORS))
    return together(lambda: _state_of(folder, description, tensors))


def _read_description(folder: Path) -> dict[str, Any]:
    description: dict[str, Any] = read_json(folder / DESCRIPTION)
    if description["version"] != VERSION:
        raise CheckpointError(
            f"{folder}: written by another version of blt (state version "
            f"{description['version']}, this one reads {VERSION}); start anew with --fresh"
        )
    _check_description(description)
    return description


def _check_share(folder: Path, files: Mapping[str, Any], rank: int, processes: int) -> None:
    sizes = {name: int(size) for name, (size, _) in files.items()}
    for name in _share(sizes, rank, processes):
        if _size_and_checksum(folder / name) != files[name]:
            raise ValueError(f"{name} is not what was written")


def _state_of(
    folder: Path, description: Mapping[str, Any], tensors: dict[str, Tensor]
) -> TrainingState:
    fields = {k: description[k] for k in _KINDS if k != "files"}
    fields["scored"] = description.get("scored", True)  # older states were all scored
    state = TrainingState(**fields, generator=tensors.pop("generator"), rest=tensors)
    if state.folder_name != folder.name:
        raise ValueError(f"{DESCRIPTION} is that of {state.name}")
    return state


def _check_description(description: dict[str, Any]) -> None:
    """Raise ValueError or KeyError for one that is not what was written."""
    wrong = [key for key, kind in _KINDS.items() if not isinstance(description[key], kind)]
    # States of programs before the checksum have none.
    checksum = description.pop("checksum", None)
    if wrong or checksum not in (None, _own_checksum(description)):
        raise ValueError(f"{DESCRIPTION} is not what was written")
    if TENSORS not in description["files"]:
        raise ValueError(f"{DESCRIPTION} does not tell of {TENSORS}")


def _own_checksum(description: Mapping[str, Any]) -> int:
    """Of a description without it, however it is laid out."""
    return zlib.crc32(json.dumps(description, sort_keys=True).encode())


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value
