"""What training backends promise, held by small runs written out here."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from blt_core.protocols import BackgroundSaver
from blt_core.testing.contracts import Broken, Contracts, NotPromised, require
from blt_core.testing.subject import Subject

TRAINING_BACKEND = Contracts("training_backend")


class _Net(nn.Module):
    """A small network in float32, the same each time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.hidden = nn.Linear(6, 10)
        self.head = nn.Linear(10, 8)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for each in self.parameters():
                each.copy_(0.5 * torch.randn(each.shape, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        """(n, 8) logits of (n,) ids."""
        found: Tensor = self.head(torch.tanh(self.hidden(self.embed(ids))))
        return found

    def groups(self, decays: Sequence[float] = (0.0, 0.0)) -> list[dict[str, Any]]:
        """Its weights as a run hands them to a backend: linear layers, and the rest."""
        matrices = [self.hidden.weight, self.head.weight]
        rest = [self.embed.weight, self.hidden.bias, self.head.bias]
        return [
            {"params": matrices, "weight_decay": decays[0], "matrices": True},
            {"params": rest, "weight_decay": decays[1], "matrices": False},
        ]


_IDS = torch.arange(8)
_TARGETS = torch.tensor([3, 1, 4, 1, 5, 0, 2, 6])
_CLIP = 0.5


class _Started:
    """A backend that trains a network; closed in the end."""

    def __init__(
        self,
        subject: Subject,
        *,
        accumulate: int = 1,
        clip: float = _CLIP,
        decays: Sequence[float] = (0.0, 0.0),
    ) -> None:
        self.net, self.backend = _Net(), subject.build()
        self.called = self.backend.start(
            self.net, self.net.groups(decays), clip=clip, accumulate=accumulate
        )

    def __enter__(self) -> _Started:  # noqa: PYI034 -- typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.close()

    def loss(self, part: slice = slice(None)) -> Tensor:
        """The loss of some of the examples."""
        return functional.cross_entropy(self.called(_IDS[part]), _TARGETS[part])

    def steps(self, count: int, rate: float = 0.05) -> list[float]:
        """The norms of so many steps."""
        norms = []
        for _ in range(count):
            self.backend.backward([self.loss])
            norms.append(self.backend.step(rate))
        return norms

    def weights(self) -> dict[str, Tensor]:
        """Copies of the weights, as the backend gives them."""
        return {name: each.clone() for name, each in self.backend.weights().items()}


def _norm(parts: Sequence[slice]) -> float:
    """The norm of the mean gradient over passes, by plain autograd."""
    net = _Net()
    losses = [functional.cross_entropy(net(_IDS[part]), _TARGETS[part]) for part in parts]
    torch.stack(losses).mean().backward()
    total = sum(float(each.grad.pow(2).sum()) for each in net.parameters() if each.grad is not None)
    return math.sqrt(total)


@TRAINING_BACKEND.add(
    "starts",
    "`rank` and `world_size` are known from the start; what `start` gives is called as the module.",
)
def _starts(subject: Subject, _: None) -> None:
    with _Started(subject) as run:
        for name in ("rank", "world_size"):
            value = getattr(run.backend, name)
            require(type(value) is int and value >= 0, f"{name} is {value!r}")
        with torch.no_grad(), run.backend.whole():
            found = run.called(_IDS)
        want = _Net()(_IDS)
        require(torch.allclose(found, want, atol=1e-5), "what start gave computes something else")


@TRAINING_BACKEND.add("learns", "Steps make the loss fall.")
def _backend_learns(subject: Subject, _: None) -> None:
    with _Started(subject) as run:
        before = float(run.loss().detach())
        run.steps(30)
        after = float(run.loss().detach())
    require(after < 0.7 * before, f"30 steps took the loss from {before:.3g} to {after:.3g}")


@TRAINING_BACKEND.add("norm", "`step` gives the gradients' norm before clipping.")
def _gives_norm(subject: Subject, _: None) -> None:
    with _Started(subject, clip=0.01) as run:
        [norm] = run.steps(1)
    want = _norm([slice(None)])
    require(math.isclose(norm, want, rel_tol=1e-4), f"step gave {norm}; the norm is {want}")


@TRAINING_BACKEND.add(
    "accumulate",
    "The gradient of a step is the mean over its passes.",
)
def _accumulates(subject: Subject, _: None) -> None:
    parts = [slice(0, 3), slice(3, 8)]
    with _Started(subject, accumulate=2) as run:
        run.backend.backward([lambda part=part: run.loss(part) for part in parts])
        norm = run.backend.step(0.05)
    want = _norm(parts)
    require(math.isclose(norm, want, rel_tol=1e-4), f"its norm is {norm}; the mean's is {want}")


@TRAINING_BACKEND.add("rate", "A step of rate 0 changes no weight: gradients are used once.")
def _rate(subject: Subject, _: None) -> None:
    with _Started(subject) as run:
        before = run.weights()
        norms = run.steps(1, rate=0.0)
        after = run.weights()
        same = all(torch.allclose(before[name], after[name], atol=1e-7) for name in before)
        require(same, "a step of learning rate 0 changed weights")
        norms += run.steps(1, rate=0.0)
    require(
        math.isclose(norms[0], norms[1], rel_tol=1e-5),
        "gradients of one step are in the next one too",
    )


@TRAINING_BACKEND.add(
    "groups",
    "A group of weights is drawn to 0 by its own `weight_decay`, and by no other's.",
)
def _decays(subject: Subject, _: None) -> None:
    def stepped(decays: Sequence[float]) -> dict[str, Tensor]:
        """The weights after a first step: its gradient is the same whatever the decay."""
        with _Started(subject, decays=decays) as run:
            run.steps(1)
            return run.weights()

    plain, both = stepped((0.0, 0.0)), {"hidden.weight", "head.weight"}
    for decays, drawn in (((0.5, 0.0), both), ((0.0, 0.5), plain.keys() - both)):
        found = stepped(decays)
        for name, without in plain.items():
            decay = 0.5 if name in drawn else 0.0
            if not decay and not torch.allclose(found[name], without, atol=1e-6):
                raise Broken(f"{name} decays; its group has weight_decay 0, the other one 0.5")
            if decay and not float(found[name].norm()) < float(without.norm()) * (1 - 1e-4):
                raise Broken(f"{name} does not decay; its group has weight_decay 0.5, the other 0")


@TRAINING_BACKEND.add("weights", "`weights` gives the module's `state_dict`, in full, on the CPU.")
def _gives_weights(subject: Subject, _: None) -> None:
    with _Started(subject) as run:
        found, want = run.weights(), _Net().state_dict()
    require(found.keys() == want.keys(), f"it names {sorted(found)}; expected {sorted(want)}")
    for name, tensor in want.items():
        require(
            found[name].device.type == "cpu" and torch.allclose(found[name], tensor, atol=1e-6),
            f"{name} is not what the module holds",
        )


@TRAINING_BACKEND.add("averages", "`mean` of one process gives the values themselves.")
def _averages(subject: Subject, _: None) -> None:
    with _Started(subject) as run:
        if run.backend.world_size == 1:
            found = run.backend.mean([1.5, -2.0, 0.0])
            require(found == [1.5, -2.0, 0.0], f"mean([1.5, -2.0, 0.0]) gave {found!r}")


@TRAINING_BACKEND.add(
    "resumes",
    "What `save` has written `load` goes on from, as if the run had never stopped.",
)
def _resumes(subject: Subject, _: None) -> None:
    with tempfile.TemporaryDirectory(prefix="blt-") as name:
        folder = Path(name) / "state"
        folder.mkdir()
        with _Started(subject) as run:
            run.steps(3)
            run.backend.save(folder)
            run.steps(3)
            want = run.weights()
        with _Started(subject) as run:
            run.backend.load(folder)
            run.steps(3)
            found = run.weights()
    for key, tensor in want.items():
        require(
            torch.allclose(found[key], tensor, atol=1e-6),
            f"{key} is another one than without the interruption",
        )


def _check_stages(backend: object) -> None:
    if not isinstance(backend, BackgroundSaver):
        raise NotPromised("it is not saved while training goes on")


def _write_aside(write: Callable[[Path], Sequence[Path]], folder: Path) -> list[Path]:
    """Have another thread write what was staged, as a run does; the files that it tells."""
    folder.mkdir()
    with ThreadPoolExecutor(1) as threads:
        return list(threads.submit(write, folder).result())


def _continued(subject: Subject, folder: Path) -> list[dict[str, Tensor]]:
    """The weights of a run that goes on from a state, and those after two more steps."""
    with _Started(subject) as run:
        run.backend.load(folder)
        found = [run.weights()]
        run.steps(2)
        return [*found, run.weights()]


@TRAINING_BACKEND.add(
    "stages",
    "Where there is a `stage`: what it gives writes, in another thread and after later steps, what "
    "`save` would have written when `stage` was called; a run that `load`s it is the same, bit for "
    "bit.",
)
def _stages(subject: Subject, _: None) -> None:
    with tempfile.TemporaryDirectory(prefix="blt-") as name:
        folder = Path(name)
        with _Started(subject) as run:
            _check_stages(run.backend)
            for number in ("first", "second"):
                run.steps(2)
                (folder / f"{number}-saved").mkdir()
                run.backend.save(folder / f"{number}-saved")
                write = run.backend.stage()
                run.steps(2)
                _write_aside(write, folder / f"{number}-staged")
        for number in ("first", "second"):
            want, found = (
                _continued(subject, folder / f"{number}-{written}")
                for written in ("saved", "staged")
            )
            for steps, before, after in zip((0, 2), want, found, strict=True):
                other = [key for key in before if not torch.equal(before[key], after[key])]
                require(
                    not other,
                    f"{steps} steps after the {number} state {', '.join(other)} differ from those "
                    "after a state that `save` wrote in its place; is all of it copied?",
                )


@TRAINING_BACKEND.add(
    "lists",
    "What `stage` gives tells the files that it has written, all of them, in the folder that it "
    "was given.",
)
def _lists(subject: Subject, _: None) -> None:
    with tempfile.TemporaryDirectory(prefix="blt-") as name, _Started(subject) as run:
        _check_stages(run.backend)
        run.steps(1)
        folder = Path(name) / "state"
        told = {path.resolve() for path in _write_aside(run.backend.stage(), folder)}
        there = {path.resolve() for path in folder.rglob("*") if path.is_file()}
        require(bool(there), "it has written no file")
        hidden, absent = sorted(map(str, there - told)), sorted(map(str, told - there))
        require(not hidden, f"it has written {hidden} and does not tell")
        require(not absent, f"it tells of {absent}, which are not there")


@TRAINING_BACKEND.add("again", "A later `start` lets the former module go and trains the new one.")
def _again(subject: Subject, _: None) -> None:
    with _Started(subject) as run:
        run.steps(2)
        net = _Net()
        run.called = run.backend.start(net, net.groups(), clip=_CLIP, accumulate=1)
        run.steps(2)
        found, start = run.weights(), _Net().state_dict()
        own = {name: each.detach().clone() for name, each in net.state_dict().items()}
    moved = any(not torch.equal(own[name], start[name]) for name in start)
    require(moved, "after a second start the new module is not trained")
    same = all(torch.allclose(found[name], own[name], atol=1e-6) for name in start)
    require(same, "after a second start `weights` gives another module's")
