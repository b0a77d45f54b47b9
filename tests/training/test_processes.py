"""Several processes train what one does: DDP and FSDP2 under torchrun, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from blt_core.pipeline import read_checkpoint
from blt_core.plugins import load_plugins

pytestmark = pytest.mark.slow

#: Sums in another order round apart.
CLOSE = {"rel": 1e-5, "abs": 1e-6}

#: ``blt`` whose processes vanish after a step of the model, if HALT says which.
PROGRAM = """
import os
from blt_core.cli import main
from blt_plugins.training.loop import Trainer

look_after = Trainer._look_after

def halting(self, phase, done, states):
    look_after(self, phase, done, states)
    if phase.name == "model" and str(done) == os.environ.get("HALT"):
        os._exit(0)

Trainer._look_after = halting
main()
"""


@pytest.fixture
def blt_train(tables, tmp_path):
    """Trains the tiny config with ``processes`` processes; gives the records of the run."""

    def train(
        out: str,
        processes: int,
        strategy: str = "ddp",
        halt: int | None = None,
        code: int = 0,
        **settings: Any,
    ) -> Any:
        backend = {"use": "torch", "strategy": strategy}
        changed = {**tables, "training_backend": backend}
        changed["train"] = {**tables["train"], "accumulate": 2, **settings}
        config = tmp_path / f"{out}.toml"
        config.write_text(tomli_w.dumps(changed))
        program = tmp_path / "program.py"
        program.write_text(PROGRAM)
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone"]
            launch += ["--nproc-per-node", str(processes)]
        command = [*launch, str(program), "train", str(config), "--out", str(tmp_path / out)]
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HALT": str(halt)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert (done.returncode == 0) == (code == 0), done.stderr
        return records(tmp_path / out) if code == 0 else {}, done

    return train


def records(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return {(r["phase"], r["step"]): r for r in found if "loss" in r}


def assert_same(one, other) -> None:
    assert one.keys() == other.keys()
    for key, record in one.items():
        for name in ("loss", "grad_norm", "bits_per_byte"):
            if name in record:
                assert record[name] == pytest.approx(other[key][name], **CLOSE), (key, name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_take_the_steps_of_one(blt_train, tmp_path, strategy):
    alone, _ = blt_train("one", 1)
    two, done = blt_train("two", 2, strategy)
    assert_same(alone, two)
    assert done.stdout.count("model: ") == 1  # the second process is silent
    _, tensors = read_checkpoint(str(tmp_path / "one" / "model"), load_plugins())
    _, theirs = read_checkpoint(str(tmp_path / "two" / "model"), load_plugins())
    assert tensors.keys() == theirs.keys()
    for name in tensors:
        assert tensors[name].allclose(theirs[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(
    ("before", "after"), [((1, "ddp"), (2, "fsdp")), ((2, "fsdp"), (2, "ddp"))]
)
def test_a_run_goes_on_in_other_processes(blt_train, before, after):
    whole, _ = blt_train("whole", 1)
    blt_train("part", *before, halt=7)
    found, done = blt_train("part", *after)
    assert "resumed at model step 5" in done.stderr
    assert_same(whole, found)


def test_passes_that_cannot_be_dealt_out_are_refused(blt_train):
    _, done = blt_train("uneven", 2, accumulate=3, code=2)
    assert "uneven.toml: train.accumulate: 3 passes cannot be dealt out to 2 processes" in (
        done.stderr
    )
