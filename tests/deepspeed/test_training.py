"""``blt train`` with DeepSpeed under two launchers: the losses of one process, a model to load."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.training.forks import Forks

FOLDER = Path(__file__).parent
BLT = Path(sys.executable).with_name("blt")
TORCHRUN = (
    sys.executable, "-m", "torch.distributed.run", "--standalone",
    "--nproc-per-node", "2", "--no-python",
)  # fmt: skip
DEEPSPEED = (
    sys.executable, str(BLT.with_name("deepspeed")), "--num_accelerators", "2",
    "--no_local_rank", "--no_python", "--master_port", "PORT",
)  # fmt: skip
#: Sums in another order round apart.
CLOSE = {"rel": 0, "abs": 1e-6}
STAGE_3 = {"use": "deepspeed", "stage": 3}
WHOLE = pytest.mark.nightly(
    reason="test_scores_are_those_of_one_process_of_plain_torch[3-3-True] shares the scores out too"
)
BLOCKS = {"use": "block-diffusion", "block_bytes": 4, "share": 0.5, "stale_share": 0.5}

#: Goes through all that needs no training, then names what of DeepSpeed was imported.
LOOK_AROUND = """
import importlib, pkgutil, sys
from pathlib import Path
import blt_plugins.deepspeed as package
from blt_core.cli.app import run
from blt_core.wiring.config import load_config
from blt_core.plugins.loading import load_plugins
from blt_plugins.training.run.make_job import make_job

for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
assert run(["plugins"]) == 0
for config in sys.argv[1:]:
    make_job(load_config(config), load_plugins(), out=Path("out"))
print("imported:", [name for name in sys.modules if name.split(".")[0] == "deepspeed"])
"""
pytestmark = pytest.mark.slow


def load(path: Path, name: str) -> Any:
    """A module by its file: test folders are no packages."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


launch = load(FOLDER / "launch.py", "launch")
TINY = load(FOLDER.parent / "training" / "conftest.py", "training_conftest").TINY


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


class Runs:
    """Trains a tiny config in a folder of its own."""

    def __init__(self, folder: Path, forks: Forks, extensions: Path) -> None:
        self.folder, self.extensions, self._forks = folder, extensions, forks
        self._made: set[str] = set()
        for index in range(12):
            file = folder / "texts" / f"file{index}.py"
            file.parent.mkdir(exist_ok=True)
            lines = (f"def name{index}_{line}(x):\n    return x + {line}\n" for line in range(3))
            file.write_text("".join(lines)[: 90 + 10 * index])

    def blt(self, processes: int, *arguments: str) -> str:
        """What ``blt`` wrote in as many processes, which no launcher has started."""
        done = self._forks.run(processes, [str(BLT), *arguments], {})
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def start(self, *command: str) -> str:
        env = launch.environment(self.extensions) | {"DS_ACCELERATOR": "cpu"}
        return launch.run(command, env)

    def config(self, out: str, backend: dict[str, Any], **train: Any) -> str:
        """A config with this ``[training_backend]``; DeepSpeed computes its layers twice.

        Further keys go into ``[train]``.
        """
        tables = copy.deepcopy(dict(TINY))
        tables["corpus"]["path"] = str(self.folder / "texts")
        tables["train"] |= {"steps": 4, "accumulate": 2, "validate_every": 2}
        tables["train"] |= {"checkpoint_every": 2, "valid_drafts": 2}
        tables["train"]["gradient_checkpointing"] = backend["use"] == "deepspeed"
        tables["train"]["scorer"]["steps"] = 2
        tables["train"] |= {**train, "scorer": tables["train"]["scorer"] | train.get("scorer", {})}
        tables |= {"objective": BLOCKS, "training_backend": backend}
        tables["decoder"]["denoises"] = True
        config = self.folder / f"{out}.toml"
        config.write_text(tomli_w.dumps(tables))
        return str(config)

    def train(
        self,
        out: str,
        backend: dict[str, Any],
        launcher: Sequence[str] = (),
        processes: int = 1,
        **train: Any,
    ) -> str:
        """What a run wrote; all of its files lie in ``folder / out``."""
        config = self.config(out, backend, **train)
        command = ("train", config, "--out", str(self.folder / out))
        # DeepSpeed's own port is one for all that run on a machine.
        launcher = [free_port() if word == "PORT" else word for word in launcher]
        if launcher:
            written = self.start(*launcher, str(BLT), *command)
        else:
            written = self.blt(processes, *command)
        assert (self.folder / out / "model" / "config.toml").exists(), written
        return written

    def once(self, out: str, backend: dict[str, Any], launcher: Sequence[str] = ()) -> Path:
        """The folder of a run that several tests look at, which is made for the first of them."""
        if out not in self._made:
            self.train(out, backend, launcher)
            self._made.add(out)
        return self.folder / out


def logged(out: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in logged(out) if "loss" in record]


def scores(out: Path) -> dict[str, dict[str, float]]:
    """What held-out text was scored by, in each phase."""
    return {record.pop("phase"): record for record in logged(out) if "bits_per_byte" in record}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, forks: Forks, extensions: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), forks, extensions)


@pytest.fixture(scope="module")
def one_process(runs: Runs) -> list[float]:
    """The losses of plain torch in one process."""
    found = losses(runs.once("torch", {"use": "torch"}))
    assert len(found) == 6
    return found


@pytest.mark.parametrize(
    ("out", "stage", "launcher"),
    [
        ("torchrun", 3, TORCHRUN),
        pytest.param(
            *("deepspeed", 2, DEEPSPEED),
            marks=pytest.mark.nightly(
                reason="torchrun starts the same; test_backend takes stage 2's steps"
            ),
        ),
    ],
)
def test_two_processes_log_the_losses_of_plain_torch_in_one(
    runs, one_process, out, stage, launcher
):
    folder = runs.once(out, {"use": "deepspeed", "stage": stage}, launcher)
    assert losses(folder) == pytest.approx(one_process, **CLOSE)
    assert not list(runs.extensions.iterdir())


@pytest.mark.nightly(reason="test_backend.py tells as much of bfloat16, in one process and in two")
def test_bfloat16_weights_log_losses_near_those_of_float32_ones(runs, one_process):
    folder = runs.once("half", {**STAGE_3, "weight_dtype": "bfloat16"}, TORCHRUN)
    found = losses(folder)
    assert found[:2] == pytest.approx(one_process[:2], **CLOSE)  # the scorer's are float32
    assert found[2:] == pytest.approx(one_process[2:], rel=1e-3)
    assert found[2:] != pytest.approx(one_process[2:], **CLOSE)


@pytest.mark.parametrize(
    ("processes", "stage", "few"),
    [
        pytest.param(2, 0, False, marks=WHOLE),
        pytest.param(2, 1, False, marks=WHOLE),
        pytest.param(3, 2, False, marks=WHOLE),
        pytest.param(
            2, 3, False, marks=pytest.mark.nightly(reason="[3-3-True] gathers stage 3 too")
        ),
        (3, 3, True),
    ],
)
def test_scores_are_those_of_one_process_of_plain_torch(runs, processes, stage, few):
    """Of weights that steps do not change, a window a pass: nothing rounds but the sums."""
    keys = {"steps": 1, "validate_every": 1, "accumulate": 6, "learning_rate": 1e-30}
    keys["scorer"] = {"steps": 1, "batch_bytes": 6, "learning_rate": 1e-30}
    keys |= {"valid_bytes": 1, "valid_drafts": 1} if few else {"valid_drafts": 5}
    torch = f"scores-torch-{few}"
    if not (runs.folder / torch).exists():
        runs.train(torch, {"use": "torch"}, **keys)
    out = f"scores-{processes}-{stage}-{few}"
    runs.train(out, {"use": "deepspeed", "stage": stage}, processes=processes, **keys)
    found, wanted = scores(runs.folder / out), scores(runs.folder / torch)
    names = {"bits_per_byte", "masked_accuracy/1.0", "accepted/blt-s draft_bytes=16"}
    assert names <= wanted["model"].keys()
    assert found.keys() == wanted.keys() == {"scorer", "model"}
    for phase, theirs in wanted.items():
        assert found[phase] == pytest.approx(theirs, rel=1e-9, abs=0)


def test_one_process_goes_on_from_what_two_saved(runs, one_process):
    # As if the run had been killed in its last step.
    shutil.copytree(runs.once("torchrun", STAGE_3, TORCHRUN), runs.folder / "killed")
    shutil.rmtree(runs.folder / "killed" / "state" / "model-00000004")
    written = runs.train("killed", STAGE_3)
    assert "resumed at model step 2" in written
    assert losses(runs.folder / "killed") == pytest.approx(one_process, **CLOSE)


def test_a_model_that_two_processes_wrote_generates(runs):
    model = str(runs.once("torchrun", STAGE_3, TORCHRUN) / "model")
    sampler = "blt-auto block_bytes=4"  # longer ones than it was trained on are warned of
    arguments = ("--checkpoint", model, "--sampler", sampler, "--prompt", "def ")
    arguments += ("--max-new-bytes", "3", "--json")
    record = json.loads(runs.blt(1, "generate", *arguments))
    assert len(record["ids"]) == 3


def test_deepspeed_is_not_imported_before_it_trains(runs):
    configs = (runs.config("lazy-torch", {"use": "torch"}), runs.config("lazy", STAGE_3))
    assert runs.start(sys.executable, "-c", LOOK_AROUND, *configs).endswith("imported: []\n")
