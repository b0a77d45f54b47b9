"""``blt train`` and ``blt calibrate``; what needs torch is imported once they run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
import typer

from blt_core.cli.inputs import ConfigArgument, DeviceOption, JsonOption, find_config
from blt_core.cli.streams import console, output, output_json
from blt_core.plugins.loading import Plugins, load_plugins
from blt_core.wiring.config import Config
from blt_plugins.training.run.interrupts import stopped_at_once

if TYPE_CHECKING:
    from blt_plugins.training.run.trainer import Job, TrainResult
    from blt_plugins.training.scores.calibration import Calibration

#: Rows of the histogram, and the width of its longest bar.
_ROWS, _BAR = 16, 40


# The steps of a run see to signals themselves; there is nothing to save before and after them.
@stopped_at_once("run the same command again to go on")
def train(  # noqa: PLR0913 -- one parameter an option
    config: ConfigArgument,
    *,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; default: [train] out, or runs/NAME.")
    ] = None,
    corpus: Annotated[Path | None, typer.Option(help="Another corpus folder.")] = None,
    device: DeviceOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew, not from OUT/state.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only tell how much memory it takes; train nothing.")
    ] = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="With --plan: for so many processes (default: 1).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model: its byte scorer, the patch threshold, then the model itself.

    Run it again to go on after an interruption.
    """
    from blt_plugins.training.setup.config import make_job

    plugins = load_plugins()
    settings = find_config(config).with_run(device=device)
    if plan:
        _plan(settings, plugins, processes=world_size or 1, as_json=as_json)
        return
    if world_size is not None:
        text = "only --plan takes it; start as many processes with torchrun"
        raise typer.BadParameter(text, param_hint="--world-size")
    job = make_job(settings, plugins, out=out, corpus=corpus)
    result = _train(job, plugins, fresh=fresh)
    if job.backend.rank == 0:
        _show_result(result, as_json=as_json)


def _train(job: Job, plugins: Plugins, *, fresh: bool) -> TrainResult:
    """Run a job, of which plugins are told."""
    from blt_plugins.training.run.report import ObservedReport, SilentReport, new_report
    from blt_plugins.training.run.trainer import Trainer

    result = None
    inner = new_report(sys.stderr) if job.backend.rank == 0 else SilentReport()
    report = ObservedReport(inner, plugins.notify, job)
    plugins.notify("blt_run_start", run=job)
    try:
        result = Trainer(job, report).run(fresh=fresh)
    finally:
        report.close()
        plugins.notify("blt_run_end", run=job, result=result)
    return result


@stopped_at_once("run the same command again")
def calibrate(
    source: Annotated[str, typer.Argument(help="A checkpoint, or a config that names one.")],
    files: Annotated[list[Path], typer.Argument(help="Text like that the model will see.")],
    *,
    target: Annotated[float, typer.Option(help="Mean patch length in bytes.")] = 4.0,
    write: Annotated[
        bool, typer.Option("--write", help="Store the threshold in the checkpoint folder.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the patch threshold for a mean patch length, and show how long patches get."""
    from blt_plugins.training.cli.calibrate import calibrate_source, write_threshold

    plugins = load_plugins()
    found = calibrate_source(source, files, target, plugins)
    if write:
        write_threshold(source, found.threshold, plugins)
    if as_json:
        output_json({**attrs.asdict(found), "reached": found.reached})
    else:
        _show(found)


def _plan(config: Config, plugins: Plugins, *, processes: int, as_json: bool) -> None:
    from blt_plugins.training.cli.plan import plan_record, show_plan
    from blt_plugins.training.planning.plan import Planner

    found = Planner(config, plugins).plan(processes)
    if as_json:
        output_json(plan_record(found))
    else:
        show_plan(found)


def _show_result(result: TrainResult, *, as_json: bool) -> None:
    if as_json:
        record = {
            "model": str(result.model),
            "threshold": result.threshold,
            "bits_per_byte": result.best_bits_per_byte,
            "plot": str(result.plot) if result.plot else None,
        }
        output_json(record)
        return
    if result.best_bits_per_byte is not None:
        output(f"held-out bits per byte: {result.best_bits_per_byte:.4f}")
    if result.plot is not None:
        output(f"losses: {result.plot}")
    output(f"model: {result.model}")


def _show(found: Calibration) -> None:
    from rich.table import Table

    shown = console(100)
    shown.print(f"threshold = {found.threshold}  # nats")
    missed = "" if found.reached else f" ({found.target_patch_bytes:g} is out of reach)"
    shown.print(
        f"mean patch length: {found.mean_patch_bytes:.2f} bytes{missed}, "
        f"{found.patches} patches in {found.bytes} bytes"
    )
    table = Table(box=None, header_style="bold")
    for name in ("bytes", "patches", "share"):
        table.add_column(name, justify="right")
    table.add_column()
    rows = histogram_rows(found.histogram)
    highest = max(count for _, count in rows)
    for label, count in rows:
        table.add_row(label, str(count), f"{count / found.patches:.1%}", _bar(count / highest))
    shown.print(table)


def histogram_rows(histogram: Mapping[int, int]) -> list[tuple[str, int]]:
    """Lengths and counts to show; lengths above the last row's are counted together."""
    rows = [(str(size), histogram.get(size, 0)) for size in range(1, _ROWS + 1)]
    longer = sum(count for size, count in histogram.items() if size > _ROWS)
    last = min(max(histogram), _ROWS)
    return rows[:last] + ([(f"{_ROWS + 1}+", longer)] if longer else [])


def _bar(share: float) -> str:
    """A bar of eighths of a character."""
    eighths = round(_BAR * 8 * share)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
