"""What ``blt train --plan`` estimates for steps of two processes, against two that run.

    OMP_NUM_THREADS=1 python benchmarks/step_estimate.py
    python benchmarks/step_estimate.py --config benchmarks/train_speed_1b.toml --json

Two numbers are measured first: how many floating-point operations a second the steps of one process
reach (its counted operations over its median step), and how many bytes a second a process sends to
another on this machine (an all-reduce of 64 MB between two, by gloo). The plan's formulas get these
for one process, whose step they give by themselves, and for two, which take one pass each of the
same steps. Each process has one thread. Sides take turns; a run is --steps steps after as many to
warm up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from blt_core.wiring.config import load_config

SIDES: Mapping[str, tuple[int, str]] = {
    "one process": (1, "ddp"),
    "two, ddp": (2, "ddp"),
    "two, fsdp": (2, "fsdp"),
}
LINK = """
import time, torch
from torch import distributed
distributed.init_process_group("gloo")
block, found = torch.ones(16_000_000), []
for _ in range(7):
    began = time.perf_counter()
    distributed.all_reduce(block)
    found.append(time.perf_counter() - began)
if distributed.get_rank() == 0:
    print(block.nbytes / sorted(found)[3])
distributed.destroy_process_group()
"""


def launch(processes: int, *arguments: str) -> str:
    """What a program prints that runs in so many processes of one thread."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *(several if processes > 1 else []), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def main() -> None:
    """Measure, ask, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "train_speed.toml")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "link.py").write_text(LINK)
        (folder / "blt.py").write_text("from blt_core.cli import main\nmain()\n")
        configs = {side: config(folder, side, options) for side in SIDES}
        size = load_config(options.config).tables["train"]["batch_bytes"]
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for repeat in range(options.repeats):
            for side, (processes, _) in SIDES.items():
                out = folder / f"{side}-{repeat}"
                blt = (str(folder / "blt.py"), "train", str(configs[side]))
                launch(processes, *blt, "--out", str(out))
                seconds[side] += steps(out, options.steps, size)
        link = float(launch(2, str(folder / "link.py")))
        planned = {
            side: plan(folder, configs[side], processes) for side, (processes, _) in SIDES.items()
        }
    report(seconds, planned, link, as_json=options.json)


def config(folder: Path, side: str, options: argparse.Namespace) -> Path:
    """The config of a side: its backend, and the standard library as text."""
    tables: dict[str, Any] = dict(load_config(options.config).tables)
    text = {"use": "folder", "path": sysconfig.get_path("stdlib"), "pattern": "*.py"}
    train = {**tables["train"], "steps": 2 * options.steps, "log_every": 1, "plot": False}
    tables |= {
        "corpus": text,
        "train": {**train, "tensorboard": False},
        "training_backend": {"use": "torch", "strategy": SIDES[side][1]},
    }
    path = folder / f"{side}.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


def steps(out: Path, count: int, size: int) -> list[float]:
    """Seconds of the last ``count`` steps of a run, each of ``size`` bytes."""
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    speeds = [r["bytes_per_second"] for r in records if "bytes_per_second" in r]
    return [size / speed for speed in speeds[-count:]]


def plan(folder: Path, path: Path, processes: int) -> dict[str, Any]:
    """The plan of the model's phase."""
    asked = (str(folder / "blt.py"), "train", str(path), "--plan", "--json")
    found = json.loads(launch(1, *asked, "--world-size", str(processes)))
    phase: dict[str, Any] = found["phases"]["model"]
    return phase


def report(
    seconds: Mapping[str, list[float]],
    planned: Mapping[str, Mapping[str, Any]],
    link: float,
    *,
    as_json: bool,
) -> None:
    """Print what was measured beside what the plan's formulas give."""
    first = next(iter(SIDES))
    alone = statistics.median(seconds[first])
    flops = planned[first]["passes"] * planned[first]["pass_flops"] / alone
    rows = []
    for side in SIDES:
        found, phase = statistics.median(seconds[side]), planned[side]
        compute = phase["passes"] * phase["pass_flops"] / flops
        sending = phase["traffic"] / link
        rows.append({
            "side": side, "measured": found, "least": min(seconds[side]),
            "most": max(seconds[side]), "fastest": max(compute, sending),
            "slowest": compute + sending, "traffic": phase["traffic"],
        })  # fmt: skip
    if as_json:
        print(json.dumps({"flops": flops, "link": link, "sides": rows}, indent=1))
        return
    print(f"{flops / 1e9:.1f} GFLOP/s reached, {link / 1e9:.2f} GB/s sent")
    for row in rows:
        print(
            f"{row['side']:12}  {row['measured']:.3f} s ({row['least']:.3f} to {row['most']:.3f}) "
            f"measured, {row['fastest']:.3f} to {row['slowest']:.3f} s estimated, "
            f"{row['traffic'] / 1e6:.1f} MB sent"
        )


if __name__ == "__main__":
    main()
