"""``blt train`` under each launcher and backend: the losses of one process, and a model to load."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

FOLDER = Path(__file__).parent
BLT = Path(sys.executable).with_name("blt")
TORCHRUN = (
    sys.executable, "-m", "torch.distributed.run", "--standalone",
    "--nproc-per-node", "2", "--no-python",
)  # fmt: skip
DEEPSPEED = (
    sys.executable, str(BLT.with_name("deepspeed")), "--num_accelerators", "2",
    "--no_local_rank", "--no_python",
)  # fmt: skip
pytestmark = pytest.mark.slow


def load(path: Path, name: str) -> Any:
    """A module by its file: test folders are no packages."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


launch = load(FOLDER / "launch.py", "launch")
TINY = load(FOLDER.parent / "training" / "conftest.py", "training_conftest").TINY


class Runs:
    """Trains a tiny config in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.extensions = folder, folder / "extensions"
        self.extensions.mkdir()
        for index in range(12):
            file = folder / "texts" / f"file{index}.py"
            file.parent.mkdir(exist_ok=True)
            lines = (f"def name{index}_{line}(x):\n    return x + {line}\n" for line in range(3))
            file.write_text("".join(lines)[: 90 + 10 * index])

    def blt(self, *arguments: str, launcher: Sequence[str] = ()) -> str:
        env = launch.environment(self.extensions) | {"MASTER_PORT": "0"}
        return launch.run([*launcher, str(BLT), *arguments], env)

    def train(self, out: str, backend: dict[str, Any], launcher: Sequence[str] = ()) -> Path:
        """The folder of a run with this ``[training_backend]``."""
        tables = copy.deepcopy(dict(TINY))
        tables["corpus"]["path"] = str(self.folder / "texts")
        tables["train"] |= {"steps": 4, "accumulate": 2, "validate_every": 2, "tensorboard": False}
        tables["train"]["scorer"]["steps"] = 2
        tables["training_backend"] = backend
        config = self.folder / f"{out}.toml"
        config.write_text(tomli_w.dumps(tables))
        written = self.blt("train", str(config), "--out", str(self.folder / out), launcher=launcher)
        assert (self.folder / out / "model" / "config.toml").exists(), written
        return self.folder / out


def losses(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def one_process(runs: Runs) -> list[float]:
    """The losses of plain torch in one process."""
    return losses(runs.train("torch", {"use": "torch"}))


@pytest.mark.parametrize(
    ("out", "backend", "launcher"),
    [
        ("ddp", {"use": "torch"}, TORCHRUN),
        ("fsdp", {"use": "torch", "strategy": "fsdp"}, TORCHRUN),
        ("zero3", {"use": "deepspeed", "stage": 3}, TORCHRUN),
        ("zero2", {"use": "deepspeed", "stage": 2}, DEEPSPEED),
        ("zero1", {"use": "deepspeed", "stage": 1}, ()),
    ],
)
def test_training_gives_the_losses_of_one_process_and_a_model_that_generates(
    runs, one_process, out, backend, launcher
):
    folder = runs.train(out, backend, launcher)
    assert len(one_process) == 6
    assert losses(folder) == pytest.approx(one_process, rel=0, abs=1e-6)
    model = str(folder / "model")
    record = runs.blt(
        "generate", "--checkpoint", model, "--prompt", "def ", "--max-new-bytes", "3", "--json"
    )
    assert "bytes" in record
    assert not list(runs.extensions.iterdir())
