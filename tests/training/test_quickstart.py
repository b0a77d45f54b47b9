"""The quick start of the docs: a small model on one's own texts, in minutes, that generates."""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nightly import NIGHTLY, nightly_or

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
#: What the plain run changes in the config ``quickstart-train``: less than a tenth of the bytes.
FEWER = {
    "train = { steps = 200, batch_bytes = 4096": (
        "train = { steps = 75, batch_bytes = 1024, valid_bytes = 6000"
    ),
    "scorer = { steps = 200, batch_bytes = 4096": (
        "scorer = { steps = 25, batch_bytes = 1024, calibration_bytes = 20_000"
    ),
}
#: Seconds of one core, whatever else the machine does; it takes a quarter of it.
LIMIT = nightly_or(75, 300)


def core_seconds() -> float:
    """What the processes that this one has started and that have ended took of all cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def blt(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from blt_core.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def config(folder: Path) -> str:
    """The config by its name, or a file that trains on fewer bytes."""
    if NIGHTLY:
        return "quickstart-train"
    text = (ROOT / "configs" / "quickstart-train.toml").read_text("utf-8")
    for own, fewer in FEWER.items():
        assert text.count(own) == 1
        text = text.replace(own, fewer)
    file = folder / "quickstart-fewer.toml"
    file.write_text(text)
    return str(file)


def test_the_quick_start_ends_soon_with_a_model_that_generates(tmp_path):
    texts, out = str(Path(asyncio.__file__).parent), str(tmp_path / "run")
    began = core_seconds()
    done = blt("train", config(tmp_path), "--corpus", texts, "--out", out)
    assert done.returncode == 0, done.stderr
    assert core_seconds() - began < LIMIT
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line) for line in lines]
    model = [record["loss"] for record in losses if record["phase"] == "model" and "loss" in record]
    assert sum(model[-10:]) / 10 < 0.6 * model[0]
    checkpoint = ("--checkpoint", f"{out}/model", "--max-new-bytes", "32", "--json")
    written = blt("generate", "--prompt", "import asyncio\n\n", *checkpoint)
    assert written.returncode == 0, written.stderr
    assert len(json.loads(written.stdout)["ids"]) == 32
