"""``blt train`` and ``blt calibrate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from blt_core.cli.inputs import ConfigArgument, find_config
from blt_core.plugins import load_plugins
from blt_plugins.training.job import make_job
from blt_plugins.training.loop import Trainer
from blt_plugins.training.report import new_report


def train(
    config: ConfigArgument,
    *,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; default: [train] out, or runs/NAME.")
    ] = None,
    corpus: Annotated[Path | None, typer.Option(help="Another corpus folder.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew, not from OUT/state.")] = False,
) -> None:
    """Train a model: the byte scorer first, then the model over its patches.

    Run again to go on after an interruption.
    """
    job = make_job(find_config(config), load_plugins(), out=out, corpus=corpus)
    report = new_report(sys.stderr)
    try:
        result = Trainer(job, report).run(fresh=fresh)
    finally:
        report.close()
    if result.best_bits_per_byte is not None:
        typer.echo(f"held-out bits per byte: {result.best_bits_per_byte:.4f}")
    typer.echo(f"model: {result.model}")


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this plugin."""
    app.command()(train)
