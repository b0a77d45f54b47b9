"""The quick start of the docs: a small model on one's own texts, in minutes, that generates."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

#: Seconds; a machine with two cores takes a quarter of it.
LIMIT = 300


def blt(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from blt_core.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_quick_start_ends_soon_with_a_model_that_generates(tmp_path):
    texts, out = str(Path(asyncio.__file__).parent), str(tmp_path / "run")
    began = time.perf_counter()
    done = blt("train", "quickstart-train", "--corpus", texts, "--out", out)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - began < LIMIT
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line) for line in lines]
    model = [record["loss"] for record in losses if record["phase"] == "model" and "loss" in record]
    assert sum(model[-10:]) / 10 < 0.6 * model[0]
    checkpoint = ("--checkpoint", f"{out}/model", "--max-new-bytes", "32", "--json")
    written = blt("generate", "--prompt", "import asyncio\n\n", *checkpoint)
    assert written.returncode == 0, written.stderr
    assert len(json.loads(written.stdout)["ids"]) == 32
