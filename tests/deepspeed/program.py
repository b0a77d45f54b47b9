"""Trains a tiny model with the backend, as one process of some; the tests judge what it writes.

``program.py RESULT CASE FOLDER``: process 0 writes what the function CASE returns to RESULT, with
torch.save, once it is complete. Processes find each other as under any launcher.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blt_core.component import BuildContext
from blt_core.errors import BltError
from blt_core.nn import SwiGLU
from blt_plugins.deepspeed import internals as private
from blt_plugins.deepspeed.backend import DeepSpeedBackend
from blt_plugins.deepspeed.resume import TOPOLOGY
from blt_plugins.deepspeed.settings import DeepSpeedBackendParams

STEPS, PASSES, CLIP = 4, 4, 0.5
#: The step after which states are saved, and a score is taken, which must change nothing.
MIDDLE = 2
#: Every weight is split, however small it is.
CONFIG = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


class Part(nn.Module):
    """Has tied, unused, fixed and bare parameters and a buffer; called by a method."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.mlp = SwiGLU(8, 12)  # reads halves of a matrix where that is not lent
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(3, 5)  # four processes have a part of the biases each
        self.fixed = nn.Parameter(torch.full((8,), 0.5), requires_grad=False)
        self.register_buffer("shift", torch.full((8,), 0.1))

    def logits(self, ids: Tensor) -> Tensor:
        states = self.embed(ids) * self.scale * self.fixed + self.shift.to(self.scale.dtype)
        return self.head(states + self.mlp(states))


class Trained(nn.Module):
    """Ids (b, r) to the loss of predicting the next one, and a figure."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, float]]:
        logits = self.part.logits(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        return loss, {"rows": float(ids.shape[0])}


def new_module() -> Trained:
    torch.manual_seed(0)
    return Trained()


def batch(step: int, index: int) -> Tensor:
    """The ids of one of a step's PASSES passes."""
    rng = torch.Generator().manual_seed(100 * step + index)
    return torch.randint(16, (3, 6), generator=rng)


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1]
    others = [p for p in trained if p.dim() == 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def rate(step: int) -> float:
    return 0.01 * (step + 1)


class Run:
    """A backend that has started on a fresh module."""

    def __init__(self, backend: DeepSpeedBackend) -> None:
        self.backend, self.module = backend, new_module()
        self.passes = PASSES // backend.world_size
        self.wrapped = backend.start(
            self.module, groups_of(self.module), clip=CLIP, accumulate=self.passes
        )

    def step(self, step: int) -> tuple[float, float]:
        """The mean loss of a step's passes, and the norm of its gradient."""
        losses = []

        def one(index: int) -> Tensor:
            loss, figures = self.wrapped(batch(step, index))
            assert figures == {"rows": 3.0}
            losses.append(float(loss.detach()))
            return loss

        indices = range(self.backend.rank, PASSES, self.backend.world_size)
        self.backend.backward(partial(one, index) for index in indices)
        norm = self.backend.step(rate(step))
        return self.backend.mean([sum(losses) / self.passes])[0], norm

    def steps(self, first: int, last: int) -> list[tuple[float, float]]:
        return [self.step(step) for step in range(first, last)]

    def score(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits from the part itself, called differently often by each process; the weights."""
        with self.backend.whole(), torch.no_grad():
            for _ in range(self.backend.rank):
                self.module.part.logits(batch(50, 0))
            return self.module.part.logits(batch(50, 0)).clone(), self.backend.weights()


#: The newest, if any. All share one process group, since processes cannot enter one twice.
BACKENDS: list[DeepSpeedBackend] = []


def new_backend(stage: int, **keys: Any) -> DeepSpeedBackend:
    if BACKENDS:
        BACKENDS.pop()._release()
    params = DeepSpeedBackendParams(stage=stage, config=CONFIG, **keys)
    BACKENDS.append(DeepSpeedBackend(params, BuildContext()))
    return BACKENDS[-1]


def refusal(backend: DeepSpeedBackend, folder: Path) -> str:
    Run(backend)
    try:
        backend.load(folder)
    except BltError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def made(folder: Path, backend: DeepSpeedBackend) -> Path:
    if backend.rank == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    return folder


def train(folder: Path, stages: tuple[int, ...], **keys: Any) -> dict[str, Any]:
    """Every stage: train, score and save in the middle, go on; then again from what was saved."""
    result: dict[str, Any] = {}
    for stage in stages:
        backend = new_backend(stage, **keys)
        run = Run(backend)
        figures = run.steps(0, MIDDLE)
        backend.save(made(folder / f"{stage}" / "middle", backend))
        logits, middle = run.score()
        figures += run.steps(MIDDLE, STEPS)
        backend.save(made(folder / f"{stage}" / "end", backend))
        weights = backend.weights()
        again = Run(backend)  # a later start lets the former module go
        backend.load(folder / f"{stage}" / "middle")
        result[f"{stage}"] = {
            "figures": figures,
            "middle": middle,
            "weights": weights,
            "logits": logits,
            "resumed": again.steps(MIDDLE, STEPS),
            "left": {k: v.detach().clone() for k, v in run.module.state_dict().items()},
            "left_logits": run.module.part.logits(batch(50, 0)).detach(),
        }
    return result


def go_on(folder: Path, pairs: tuple[tuple[int, int], ...], **keys: Any) -> dict[str, Any]:
    """For each pair: a state of the first stage goes on in the second, is saved and read anew."""
    result: dict[str, Any] = {}
    for saved, stage in pairs:
        backend = new_backend(stage, **keys)
        run = Run(backend)
        backend.load(folder / f"{saved}" / "middle")
        figures = run.steps(MIDDLE, MIDDLE + 1)
        here = made(folder / f"{saved}" / f"on-{stage}-{backend.world_size}", backend)
        backend.save(here)
        again = Run(backend)
        backend.load(here)
        figures += again.steps(MIDDLE + 1, STEPS)
        result[f"{saved}-{stage}"] = {"figures": figures, "weights": backend.weights()}
    return result


def alone(folder: Path) -> dict[str, Any]:
    """One process without a launcher."""
    return {
        "float32": train(folder / "one", (1, 3)),
        "bfloat16": train(folder / "half", (1, 2, 3), weight_dtype="bfloat16"),
        "optimizer away": train(folder / "away", (2,), offload_optimizer="cpu"),
        "all away": train(
            folder / "all-away", (3,), offload_optimizer="cpu", offload_parameters="cpu"
        ),
    }


def pair(folder: Path) -> dict[str, Any]:
    """Two processes: every stage, stage 3 at its most unlike, and what one process left."""
    away = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
    return {
        "float32": train(folder / "two", (0, 1, 2, 3)),
        "bfloat16": train(folder / "two-half", (3,), weight_dtype="bfloat16"),
        "all away": train(folder / "two-away", (3,), **away),
        "from one": go_on(folder / "one", ((1, 1), (3, 3))),
    }


def after(folder: Path) -> dict[str, Any]:
    """One process again: what two left, and a state that has lost its files."""
    two = folder / "two"
    bad = folder / "bad"
    bad.mkdir()
    (bad / TOPOLOGY).write_bytes((two / "2" / "middle" / TOPOLOGY).read_bytes())
    return {
        "from two": go_on(two, ((0, 0), (3, 3), (1, 2), (2, 1))),
        "bad": refusal(new_backend(2), bad),
    }


def more(folder: Path) -> dict[str, Any]:
    """Two processes: what one left of bfloat16 weights, and of an optimizer on the CPU."""
    half = ((1, 1), (1, 2), (2, 1), (3, 3))
    return {
        "half": go_on(folder / "half", half, weight_dtype="bfloat16"),
        "away": go_on(folder / "away", ((2, 1), (2, 2))),
    }


def four(folder: Path) -> dict[str, Any]:
    """Four processes: what two left."""
    return go_on(folder / "two", ((0, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 3)))


def internals(folder: Path) -> dict[tuple[str, int], str]:
    """What is wrong with each internal at each stage that uses it; "" for nothing.

    The backend's own checks are off, and engines are not taken out of their modules: either may
    need just what is missing.
    """
    found: dict[tuple[str, int], str] = {}
    private.check_package = private.check_engine = lambda *_: None
    for stage in range(4):
        run = Run(new_backend(stage))
        owners = {"deepspeed": [deepspeed_package()], "engine": [run.wrapped]}
        owners["parameter"] = list(run.module.parameters())
        for each in private.INTERNALS:
            if stage in each.stages:
                problems = {each.problem(owner) for owner in owners[each.owner]}
                found[each.path, stage] = " ".join(sorted(problems))
        BACKENDS.clear()
    return found


def deepspeed_package() -> Any:
    import deepspeed

    return deepspeed


def reference() -> Iterator[tuple[float, float, dict[str, Tensor]]]:
    """What a plain torch loop gives on all of a step's passes: loss, norm, weights after it."""
    module = new_module()
    optimizer = torch.optim.AdamW(groups_of(module), lr=0.0, betas=(0.9, 0.95))
    for step in range(STEPS):
        losses = [module(batch(step, index))[0] for index in range(PASSES)]
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
            for parameter in group["params"]:
                # To DeepSpeed an unused weight has gradient 0, so it decays; to torch it has none.
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        yield (
            float(loss.detach()),
            float(norm),
            {k: v.clone() for k, v in module.state_dict().items()},
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = (alone, pair, after, more, four, internals)
    outcome = {case.__name__: case for case in cases}[sys.argv[2]](Path(sys.argv[3]))
    while BACKENDS:
        BACKENDS.pop().close()
    if int(os.environ.get("RANK", "0")) == 0:
        target = Path(sys.argv[1])
        torch.save(outcome, target.with_suffix(".part"))
        target.with_suffix(".part").rename(target)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # two processes that have finished sometimes abort as Python ends
