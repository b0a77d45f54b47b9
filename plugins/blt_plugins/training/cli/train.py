"""``blt train``; what needs torch is imported once it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blt_core.cli.inputs import ConfigArgument, DeviceOption, JsonOption, find_config
from blt_core.cli.streams import output, output_json
from blt_core.plugins.loading import Plugins, load_plugins
from blt_plugins.training.run.interrupts import stopped_at_once

if TYPE_CHECKING:
    from blt_plugins.training.run.job import Job, TrainResult


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
        bool,
        typer.Option("--plan", help="Only tell what memory and time it takes; train nothing."),
    ] = False,
    world_size: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="With --plan: for so many processes (default: 1); may be given again."
        ),
    ] = None,
    device_type: Annotated[
        str | None,
        typer.Option(help="With --plan: on such devices, as h100; or 'own key=value …'."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model: its byte scorer, the patch threshold, then the model itself.

    Run it again to go on after an interruption.
    """
    from blt_plugins.training.run.make_job import make_job

    plugins = load_plugins()
    settings = find_config(config).with_run(device=device)
    if plan:
        from blt_plugins.training.cli.plan import tell_plan

        tell_plan(settings, plugins, world_size or [1], device_type, as_json=as_json)
        return
    if world_size:
        text = "only --plan takes it; start as many processes with torchrun"
        raise typer.BadParameter(text, param_hint="--world-size")
    if device_type is not None:
        raise typer.BadParameter("only --plan takes it", param_hint="--device-type")
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
