"""The state of the torch backend on the disk: weights and optimizer.

Processes that spread weights write a file each, of the rows that they keep; otherwise process 0
writes one. A file says which rows it holds, so any strategy and number of processes reads from any
files what it keeps itself, and no process ever has, or sends, more than that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from blt_core.errors import CheckpointError
from blt_core.storage.safetensors import open_file
from blt_core.storage.tensors import unshared
from blt_plugins.training.backends.optimizers import optimizer_of
from blt_plugins.training.backends.strategies import Alone

#: One file, or one of several.
TENSORS, PART = "training.safetensors", "training-{:05}-of-{:05}.safetensors"
_WEIGHT, _OPTIMIZER = "weight/", "optimizer/"
#: In a file's metadata: the first row of each tensor of which it holds a part.
_FIRST_ROWS = "first_rows"


@attrs.frozen(eq=False)
class Part:
    """What one process writes of a state.

    first_rows: of the tensors that are spread, the first row that is here. spreads: whether any is.
    """

    tensors: Mapping[str, Tensor]
    first_rows: Mapping[str, int]
    spreads: bool


def own_part(
    module: nn.Module, optimizers: Iterable[Optimizer], strategy: Alone, *, rank: int
) -> Part:
    """What process ``rank`` keeps and no other writes: the tensors that training changes."""
    tensors: dict[str, Tensor] = {}
    first_rows: dict[str, int] = {}
    spreads = False
    for name, tensor in _tensors(module, optimizers):
        rows, first = strategy.part(tensor)
        spreads = spreads or first is not None
        if (first is None and rank == 0) or (first is not None and len(rows)):
            tensors[name] = rows.detach()
        if name in tensors and first is not None:
            first_rows[name] = first
    return Part(tensors, first_rows, spreads)


class Staging:
    """Memory of the CPU into which tensors are copied; it is kept for the next copy.

    It is not pinned: torch rounds pinned blocks up to a power of two, and does not give them back.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies, whole when this returns; those of an earlier call are overwritten, or let go."""
        former, self._kept = self._kept, {}
        for name, tensor in tensors.items():
            own = former.pop(name, None)
            if own is None or (own.shape, own.dtype) != (tensor.shape, tensor.dtype):
                own = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._kept[name] = own.copy_(tensor.detach())
        return dict(self._kept)


def write(folder: Path, part: Part, *, rank: int, processes: int) -> list[Path]:
    """Write a part; returns its file, if it needs one. Raises OSError, SafetensorError."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in part.tensors.items()}
    if part.spreads:
        metadata = {_FIRST_ROWS: json.dumps(part.first_rows)}
        path = folder / PART.format(rank, processes)
        save_file(unshared(tensors), path, metadata)
        return [path]
    if rank == 0:
        save_file(unshared(tensors), folder / TENSORS)
        return [folder / TENSORS]
    return []


def load(
    folder: Path, module: nn.Module, optimizers: Sequence[Optimizer], strategy: Alone, name: str
) -> None:
    """Put back what :func:`write` wrote; ``name`` of the optimizer.

    Raises CheckpointError for the state of another backend, optimizer or module.
    """
    stored = _stored(folder, name)
    own, parameters = module.state_dict(), dict(module.named_parameters())
    keepers = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }

    def read(full: str, like: Tensor) -> Tensor:
        """What this process keeps of a tensor that is spread as ``like`` is."""
        rows, first = strategy.part(like)
        return strategy.spread(stored.rows(full, like, first or 0, rows).to(like.device), like)

    for full in stored:
        if full.startswith(_WEIGHT):
            key = full.removeprefix(_WEIGHT)
            _known(key, own, folder)
            with torch.no_grad():
                own[key].copy_(read(full, own[key]))
        else:
            of, _, key = full.removeprefix(_OPTIMIZER).rpartition("|")
            _known(of, parameters, folder)
            parameter = parameters[of]
            keepers[parameter].state[parameter][key] = (
                read(full, parameter)
                if stored.shape(full)
                else stored.number(full).to(parameter.device)
            )


def whole_tensors(tensors: Mapping[str, Any], strategy: Alone, *, main: bool) -> dict[str, Tensor]:
    """Whole copies on the CPU in the ``main`` process; the others take part and keep nothing."""
    found = {}
    for name, tensor in tensors.items():
        whole = strategy.full(tensor)
        if main:
            found[name] = whole.detach().to("cpu", copy=True).contiguous()
    return found


def _tensors(module: nn.Module, optimizers: Iterable[Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """All that is saved, by the name that it has in files."""
    for name, tensor in module.state_dict().items():
        yield _WEIGHT + name, tensor
    for optimizer in optimizers:
        for name, parameter in module.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"{_OPTIMIZER}{name}|{key}", value


@attrs.frozen
class Run:
    """Rows of a tensor, from ``first`` on, in an open file."""

    first: int
    path: Path
    file: Any


class Stored(Mapping[str, Sequence[Run]]):
    """The tensors of a state, whose rows may be in several files; rows are read when asked for.

    Raises CheckpointError for a file that cannot be read, and rows that none has.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._runs: dict[str, list[Run]] = {}
        for path in paths:
            file = open_file(path)
            first_rows = json.loads((file.metadata() or {}).get(_FIRST_ROWS, "{}"))
            for name in file.keys():  # noqa: SIM118 -- it is no mapping
                run = Run(first_rows.get(name, 0), path, file)
                self._runs.setdefault(name, []).append(run)

    def __getitem__(self, name: str) -> Sequence[Run]:
        return self._runs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a whole tensor."""
        shapes = [tuple(run.file.get_slice(name).get_shape()) for run in self[name]]
        if not shapes[0]:
            return ()
        ends = (run.first + shape[0] for run, shape in zip(self[name], shapes, strict=True))
        return max(ends), *shapes[0][1:]

    def number(self, name: str) -> Tensor:
        """A tensor without axes."""
        found: Tensor = self[name][0].file.get_tensor(name)
        return found.clone()

    def rows(self, name: str, like: Tensor, first: int, part: Tensor) -> Tensor:
        """Rows from ``first`` on, as many as ``part`` has, of a tensor with the shape of ``like``.

        Memory of its own.
        """
        runs, last = self[name], first + len(part) if part.dim() else 1
        if self.shape(name) != tuple(like.shape):
            raise CheckpointError(
                f"{runs[0].path.parent}: {name} has shape {self.shape(name)}, not "
                f"{tuple(like.shape)} as in the trained module"
            )
        if not part.dim():
            return self.number(name)
        found, done = [], first
        for run in sorted(runs, key=lambda run: run.first):
            piece = run.file.get_slice(name)
            begin, end = max(done - run.first, 0), min(last - run.first, piece.get_shape()[0])
            if run.first <= done < last and begin < end:
                try:
                    found.append(piece[begin:end])
                except SafetensorError as error:
                    raise CheckpointError(f"{run.path}: {name} cannot be read: {error}") from error
                done = run.first + end
        if done < last:
            raise CheckpointError(f"{runs[0].path.parent}: no file has row {done} of {name}")
        return torch.cat(found) if found else part.new_empty(part.shape)


def _stored(folder: Path, name: str) -> Stored:
    paths = sorted(folder.glob("training*.safetensors"))
    if not paths:
        raise CheckpointError(
            f"{folder}: holds no {TENSORS}, so another training backend wrote it\n"
            "  fix: go on with that backend, or start anew from OUT/model as [run] checkpoint"
        )
    tensors = Stored(paths)
    found = optimizer_of(tensors)
    if found not in (None, name):
        raise CheckpointError(
            f"{folder}: holds the state of optimizer {found!r}, not of {name!r}\n"
            f"  fix: training_backend.optimizer = {found!r}, or start anew from OUT/model as "
            "[run] checkpoint"
        )
    return tensors


def _known(name: str, own: Mapping[str, object], folder: Path) -> None:
    if name not in own:
        raise CheckpointError(f"{folder}: has {name!r}, which the trained module does not have")
