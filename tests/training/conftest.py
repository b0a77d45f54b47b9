"""A corpus of short texts and a config so small that a step takes milliseconds."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import structlog
import torch
from torch.overrides import TorchFunctionMode

from blt_core.cli.app import run
from blt_core.plugins.loading import load_plugins
from blt_core.wiring.config import Config
from blt_plugins.training.run.job import Job
from blt_plugins.training.run.make_job import make_job
from blt_plugins.training.run.trainer import Trainer
from tests.training.forks import Forks

TINY: Mapping[str, Any] = {
    "schema": 1,
    "corpus": {"use": "folder", "pattern": "**/*.py", "valid_percent": 20},
    "train": {
        "steps": 12,
        "batch_bytes": 256,
        "learning_rate": 5e-3,
        "warmup_steps": 2,
        "validate_every": 6,
        "valid_bytes": 300,
        "checkpoint_every": 5,
        # Drawing takes longer than all of the steps.
        "tensorboard": False,
        "plot": False,
        "scorer": {
            "steps": 8, "batch_bytes": 256, "calibration_bytes": 500, "warmup_steps": 2,
            "learning_rate": 1e-2,
        },
    },
    "model": {"context_bytes": 64},
    "patcher": {
        "use": "entropy",
        "max_patch_bytes": 8,
        "byte_scorer": {
            "use": "transformer", "dim": 16, "layers": 1, "heads": 2, "hidden": 32, "window": 16,
        },
    },
    "encoder": {
        "use": "local", "dim": 16, "heads": 2, "hidden": 32, "latent_dim": 24,
        "ngram_sizes": [3], "ngram_rows": 50, "window": 16,
    },
    "global_model": {"use": "transformer", "latent_dim": 24, "layers": 1, "heads": 2, "hidden": 32},
    "decoder": {
        "use": "local", "dim": 16, "heads": 2, "hidden": 32, "layers": 1, "latent_dim": 24,
        "window": 16,
    },
}  # fmt: skip


def write_texts(folder: Path) -> Path:
    """Write twelve different, repetitive files of 90 to 200 bytes."""
    for index in range(12):
        file = folder / f"part{index % 3}" / f"file{index}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = (f"def name{index}_{line}(x):\n    return x + {line}\n" for line in range(3))
        file.write_text("".join(lines)[: 90 + 10 * index])
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of twelve different, repetitive files of 90 to 200 bytes."""
    return write_texts(tmp_path / "texts")


@pytest.fixture
def tables(texts: Path) -> dict[str, Any]:
    """The tables of the tiny config; change them at will."""
    tables = copy.deepcopy(dict(TINY))
    tables["corpus"]["path"] = str(texts)
    return tables


@pytest.fixture(scope="module")
def lasting_tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tables of the tiny config, for what several tests look at."""
    tables = copy.deepcopy(dict(TINY))
    tables["corpus"]["path"] = str(write_texts(tmp_path_factory.mktemp("corpus") / "texts"))
    return tables


@pytest.fixture
def new_job(tables: dict[str, Any], tmp_path: Path) -> Callable[..., Job]:
    """Makes a job of the tiny config that writes to ``tmp_path / out``; keys go into [train]."""

    def make(out: str = "out", *, scorer: Mapping[str, Any] | None = None, **train: Any) -> Job:
        scorer = {**tables["train"]["scorer"], **(scorer or {})}
        changed = {**tables, "train": {**tables["train"], **train, "scorer": scorer}}
        config = Config.from_mapping(changed, "tiny.toml")
        return make_job(config, load_plugins(), out=tmp_path / out)

    return make


class Silent:
    """A report that keeps the losses, and calls ``at_step`` after each step of a phase."""

    def __init__(self, at_step: Callable[[str, int], None] = lambda _phase, _step: None) -> None:
        self.losses: dict[tuple[str, int], float] = {}
        self.notes: list[str] = []
        self._at_step, self._phase = at_step, ""

    def phase(self, name: str, step: int, steps: int) -> None:
        self._phase = name

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        self.losses[self._phase, step] = figures["loss"]
        self._at_step(self._phase, step)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def close(self) -> None: ...


@pytest.fixture
def silent() -> type[Silent]:
    """The class of a report that prints nothing."""
    return Silent


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Where the model of a finished run of the tiny config lies, with these tables changed.

    Each is trained once; whoever changes files takes a copy: ``finished``.
    """
    folder = tmp_path_factory.mktemp("finished")
    texts, made = write_texts(folder / "texts"), {}

    def model(**changes: Mapping[str, Any]) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            tables = copy.deepcopy(dict(TINY))
            tables["corpus"]["path"] = str(texts)
            for name, table in changes.items():
                tables[name] = {**tables.get(name, {}), **table}
            config = Config.from_mapping(tables, "tiny.toml")
            job = make_job(config, load_plugins(), out=folder / str(len(made)))
            Trainer(job, Silent()).run()
            made[key] = job.out / "model"
        return made[key]

    return model


@pytest.fixture
def finished(model_of: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Puts such a model into ``tmp_path / out / model``, for one test alone."""
    return lambda out="out", **changes: Path(
        shutil.copytree(model_of(**changes), tmp_path / out / "model")
    )


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Processes that begin with what training imports, for all tests."""
    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    made.close()


class Float64OnTheCpu(TorchFunctionMode):
    """Refuses to turn a tensor into float64 that was not moved to the CPU by name before.

    Some devices have no float64; here, where all is on the CPU, only this shows it.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.double:
            assert getattr(args[0], "moved", False), "float64 on a device that may not have it"
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu:
            result.moved = True
        return result


@pytest.fixture
def float64_on_the_cpu() -> TorchFunctionMode:
    """A context in which tensors must be on the CPU before they become float64."""
    return Float64OnTheCpu()


@attrs.frozen
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def blt(capsys):
    def call(*arguments: object) -> Outcome:
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    yield call
    structlog.reset_defaults()  # the command line logs to a stderr that is gone now
