"""What a small model learns in a few hundred steps of each optimizer, and what a step costs.

    OMP_NUM_THREADS=1 python benchmarks/optimizers.py [--rates 1.5e-3 3e-3] [--seeds 0 1] [--json]

The model is that of optimizers.toml, the text the standard library of the running interpreter (its
top folder; --corpus: another folder). A seed fixes weights, text and held-out text, so runs of one
seed differ by the optimizer alone.

adamw: for all parameters. muon: for the matrices inside. whole matrices: Muon too, but maps that
are stacked in one matrix (q, k and v; gate and up; keys and values of latents) are made orthogonal
together.

Printed are held-out bits per byte after the last step, and the median CPU time of a step, which
other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import attrs

from blt_core.nn import Linear
from blt_core.plugins.loading import load_plugins
from blt_core.wiring.config import Config, load_config
from blt_plugins.training.run.make_job import make_job
from blt_plugins.training.run.report import SilentReport
from blt_plugins.training.run.trainer import Trainer

CONFIG = Path(__file__).with_suffix(".toml")
WHOLE = "whole matrices"
OPTIMIZERS = ("adamw", "muon", WHOLE)


@attrs.frozen
class Result:
    """A run: held-out bits per byte, and the median CPU time of its steps."""

    optimizer: str
    rate: float
    seed: int
    bits_per_byte: float
    step_milliseconds: float


class Clock(SilentReport):
    """Takes the CPU time from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._last = time.process_time()

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """A step is over."""
        now = time.process_time()
        self.seconds.append(now - self._last)
        self._last = now


def main() -> None:
    """Train and print."""
    options = parse()
    for rate, seed, optimizer in product(options.rates, options.seeds, options.optimizers):
        result = train(optimizer, rate, seed, options)
        print(json.dumps(attrs.asdict(result)) if options.json else line(result), flush=True)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--rates", nargs="+", type=float, default=[1.5e-3, 3e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--corpus", default=sysconfig.get_paths()["stdlib"])
    parser.add_argument("--json", action="store_true", help="one object a run")
    return parser.parse_args()


def train(optimizer: str, rate: float, seed: int, options: argparse.Namespace) -> Result:
    """Train one model in a folder that is removed."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(tables(optimizer, rate, seed, options), load_plugins(), out=Path(folder))
        if optimizer == WHOLE:
            for layer in job.model.module_dict().modules():
                if isinstance(layer, Linear):
                    layer.stacked = (layer.out_features,)
        score = Trainer(job, clock).run().held_out
    if score is None:
        raise RuntimeError("the run was not scored")
    # The first step also counts the time before it.
    milliseconds = 1e3 * statistics.median(clock.seconds[1:])
    return Result(optimizer, rate, seed, score.bits_per_byte, milliseconds)


def tables(optimizer: str, rate: float, seed: int, options: argparse.Namespace) -> Config:
    """The config of a run."""
    config = load_config(str(CONFIG))
    train = {**config.tables["train"], "steps": options.steps, "learning_rate": rate, "seed": seed}
    name = "muon" if optimizer == WHOLE else optimizer
    return (
        config.with_table("train", train)
        .with_table("corpus", {"use": "folder", "path": options.corpus, "pattern": "*.py"})
        .with_table("training_backend", {"use": "torch", "optimizer": name})
    )


def line(result: Result) -> str:
    """A row of the table."""
    return (
        f"{result.optimizer:15} rate {result.rate:.1e}  seed {result.seed}  "
        f"{result.bits_per_byte:.4f} bits per byte  {result.step_milliseconds:4.0f} ms a step"
    )


if __name__ == "__main__":
    main()
