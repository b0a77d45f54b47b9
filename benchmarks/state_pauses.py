"""How long training stands still for a saved state: written at once, or in the background.

    OMP_NUM_THREADS=1 python benchmarks/state_pauses.py [--rows 100000] [--repeats 3] [--json]

The model is that of train_speed.toml with n-gram tables of --rows rows each, so that a state is
large beside a step; the text is the standard library of the running interpreter. Runs with
[train] async_states off and on take turns, in a folder that is removed (--folder: where). A state
is saved every --every steps.

Printed are seconds, the median with the least and the most: the pause, for which the run waits in a
step that saves; a step beside which nothing is written, and one beside which a state is; and how
long it takes until the state counts. The first state that holds the optimizer, for which the memory
of the copy is made, stands apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from blt_core.plugins.loading import load_plugins
from blt_core.wiring.config import Config, load_config
from blt_plugins.training.run.folder import RunFolder
from blt_plugins.training.run.make_job import make_job
from blt_plugins.training.run.report import SilentReport
from blt_plugins.training.run.trainer import Trainer

CONFIG = Path(__file__).parent / "train_speed.toml"


@attrs.define
class Times:
    """Seconds of one run: its pauses, of the first state apart; its steps; until states count."""

    first: list[float] = attrs.field(factory=list)
    pauses: list[float] = attrs.field(factory=list)
    quiet: list[float] = attrs.field(factory=list)
    beside: list[float] = attrs.field(factory=list)
    counts: list[float] = attrs.field(factory=list)


class Clock(SilentReport):
    """Takes the time of steps, and of what the folder of a run does between them."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.times, self._every = Times(), every
        self._saves, self._began = 0, 0.0
        self._folder: RunFolder | None = None
        self._last = time.perf_counter()

    def watch(self, folder: RunFolder) -> None:
        """Take the time of the saves of a run."""
        self._folder, save, note = folder, folder.save, folder._note_saved  # noqa: SLF001 -- timed

        def timed(*given: Any, **keys: Any) -> None:
            began = time.perf_counter()
            save(*given, **keys)
            now = time.perf_counter()
            # The state before the first step has no optimizer; the run waits for the last one.
            if self._saves and not keys.get("wait"):
                (self.times.first if self._saves == 1 else self.times.pauses).append(now - began)
                self._began = began
                if not self._busy:
                    self.times.counts.append(now - began)
            self._saves += 1
            self._last = now

        def noted(state: Path) -> None:
            note(state)
            if self._began:
                self.times.counts.append(time.perf_counter() - self._began)

        folder.save = timed  # type: ignore[method-assign]
        folder._note_saved = noted  # type: ignore[method-assign]  # noqa: SLF001 -- timed

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """A step is over."""
        now = time.perf_counter()
        if self._saves > 1:
            (self.times.beside if self._busy else self.times.quiet).append(now - self._last)
        self._last = now

    @property
    def _busy(self) -> bool:
        return self._folder is not None and bool(self._folder.background.news())


def main() -> None:
    """Train, and print."""
    options = parse()
    times = {False: Times(), True: Times()}
    size = 0
    for _ in range(options.repeats):
        for background, all_times in times.items():
            found, size = train(options, background=background)
            for field in attrs.fields(Times):
                getattr(all_times, field.name).extend(getattr(found, field.name))
    if options.json:
        print(json.dumps({"bytes": size, **{str(k): attrs.asdict(v) for k, v in times.items()}}))
        return
    print(f"a state of {size / 1e6:,.0f} MB; seconds, median (least to most)")
    for background, found in times.items():
        print("in the background" if background else "at once")
        for name, text in (
            ("pauses", "pause"),
            ("first", "pause, first state"),
            ("quiet", "step"),
            ("beside", "step, state written beside"),
            ("counts", "until the state counts"),
        ):
            print(f"  {text:28} {shown(getattr(found, name))}")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--batch-bytes", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", action="store_true", help="all times")
    return parser.parse_args()


def train(options: argparse.Namespace, *, background: bool) -> tuple[Times, int]:
    """One run: its times, and the bytes of its last state."""
    clock = Clock(options.every)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        job = make_job(tables(options, background=background), load_plugins(), out=Path(name))
        trainer = Trainer(job, clock)
        clock.watch(trainer._folder)  # noqa: SLF001 -- timed
        trainer.run()
        last = max((Path(name) / "state").iterdir())
        size = sum(path.stat().st_size for path in last.iterdir())
    return clock.times, size


def tables(options: argparse.Namespace, *, background: bool) -> Config:
    """The config of a run."""
    config = load_config(str(CONFIG))
    train = {
        **config.tables["train"],
        "steps": options.steps,
        "checkpoint_every": options.every,
        "batch_bytes": options.batch_bytes,
        "accumulate": 1,
        "keep_states": 2,
        "plot": False,
        "tensorboard": False,
        "async_states": background,
    }
    corpus = {"use": "folder", "path": sysconfig.get_path("stdlib"), "pattern": "*.py"}
    encoder = {**config.tables["encoder"], "ngram_rows": options.rows}
    return (
        config.with_table("train", train)
        .with_table("corpus", corpus)
        .with_table("encoder", encoder)
    )


def shown(seconds: Sequence[float]) -> str:
    """Their median, with the least and the most."""
    if not seconds:
        return "-"
    return (
        f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}), "
        f"{len(seconds)} times"
    )


if __name__ == "__main__":
    main()
