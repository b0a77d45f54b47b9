"""How processes end: when the command returns, nothing of theirs is left on threads.

A thread that wants the interpreter once it has ended aborts its process (SIGABRT), and with it the
launch of a run that was done.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.training.forks import Forks

pytestmark = pytest.mark.slow

#: ``blt train`` that tells what lives when it has returned; step FAIL of the model has no loss.
PROGRAM = """
import json, os, sys, threading
from pathlib import Path

import torch
from blt_core.cli.app import run
from blt_plugins.training.run.judge import Judge

check = Judge.check_finite

def failing(self, what, value, phase, step):
    here = phase.name == "model" and str(step) == os.environ.get("FAIL")
    check(self, what, float("nan") if here else value, phase, step)

Judge.check_finite = failing
code = run(["train", *sys.argv[2:]])
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
found = {
    "code": code,
    "group": torch.distributed.is_initialized(),
    "threads": [each.name for each in threading.enumerate() if not each.daemon],
    "native": sorted(name for name in names if "gloo" in name or "tcpstore" in name),
}
Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps(found))
sys.exit(code)
"""
DEEPSPEED = {"use": "deepspeed", "stage": 3}
BACKENDS = {
    "ddp": {"use": "torch", "strategy": "ddp"},
    "fsdp": {"use": "torch", "strategy": "fsdp"},
    "deepspeed": DEEPSPEED,
}
OTHERS = pytest.mark.nightly(reason="each backend, and each of both ends, is tried once without it")


def launched(forks: Forks, folder: Path, tables: dict[str, Any], fail: str) -> list[dict[str, Any]]:
    """What is left in each of two processes."""
    (folder / "program.py").write_text(PROGRAM)
    (folder / "config.toml").write_text(tomli_w.dumps(tables))
    command = [str(folder / "program.py"), str(folder), str(folder / "config.toml")]
    env = {"FAIL": fail, "DS_ACCELERATOR": "cpu"}
    done = forks.run(2, [*command, "--out", str(folder / "out")], env)
    assert all((folder / rank).exists() for rank in "01"), done.stderr
    return [json.loads((folder / rank).read_text()) for rank in "01"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are told by Linux")
@pytest.mark.parametrize(
    ("backend", "fail"),
    [
        ("ddp", ""),
        ("fsdp", "1"),
        ("deepspeed", ""),
        pytest.param("ddp", "1", marks=OTHERS),
        pytest.param("fsdp", "", marks=OTHERS),
        pytest.param("deepspeed", "1", marks=OTHERS),
    ],
    ids=lambda value: {"": "done", "1": "failed"}.get(value, value),
)
def test_nothing_lives_on_threads_when_the_command_returns(forks, tables, tmp_path, backend, fail):
    tables["train"] |= {"steps": 2, "accumulate": 2, "validate_every": 2}
    tables["train"]["scorer"]["steps"] = 2
    tables["train"]["async_states"] = backend == "fsdp"
    found = launched(forks, tmp_path, {**tables, "training_backend": BACKENDS[backend]}, fail)
    code = 1 if fail else 0
    left = {"code": code, "group": False, "threads": ["MainThread"], "native": []}
    assert found == [left, left]
