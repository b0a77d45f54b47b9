"""What tests of training runs share: what a run has logged and stored, and how it is disturbed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch

from blt_core.loading import read_checkpoint
from blt_core.plugins.loading import load_plugins


def metrics(out: Path) -> list[dict[str, Any]]:
    """The records of a run, without the speed, which no two runs share."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "bytes_per_second"} for x in lines]


def model_scores(out: Path) -> list[float]:
    """The held-out scores of the model, in order."""
    return [
        r["bits_per_byte"] for r in metrics(out) if r["phase"] == "model" and "bits_per_byte" in r
    ]


def stored(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Tables and tensors of a checkpoint folder."""
    tables, tensors = read_checkpoint(str(folder), load_plugins())
    return tables, {name: tensor.clone() for name, tensor in tensors.items()}


def tensors_of(job) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in job.model.module_dict().state_dict().items()}


def assert_same_run(one, other) -> None:
    """Two runs logged the same and ended in the same weights, bit for bit."""
    assert metrics(one.out) == metrics(other.out)
    ours, theirs = tensors_of(one), tensors_of(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def sends(phase: str, step: int, *numbers: signal.Signals) -> Callable[[str, int], None]:
    """What a report does after each step: sends signals to this process after one of them."""

    def send(*now) -> None:
        for number in numbers if now == (phase, step) else ():
            os.kill(os.getpid(), number)

    return send


@attrs.define
class Scaled:
    """An objective whose loss is multiplied by ``factor`` from call ``since`` on."""

    inner: Any
    factor: float
    since: int
    calls: int = 0

    def loss(self, *arguments):
        self.calls += 1
        loss, _ = self.inner.loss(*arguments)
        return (loss * self.factor if self.calls >= self.since else loss), {"calls": self.calls}


BLOCKS = {"use": "block-diffusion", "block_bytes": 4, "share": 0.5, "stale_share": 0.5}
