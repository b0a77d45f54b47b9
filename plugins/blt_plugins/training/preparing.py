"""``blt prepare``: a corpus with its patches, written once for many runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import attrs
import typer

from blt_core.cli.inputs import DeviceOption, JsonOption, find_source
from blt_core.cli.progress import progress_bar
from blt_core.config import Config
from blt_core.errors import ConfigError
from blt_plugins.training.job import with_corpus
from blt_plugins.training.prepare import Prepared
from blt_plugins.training.prepare import prepare as run


def prepare(  # noqa: PLR0913 -- one parameter an option
    source: Annotated[
        str, typer.Argument(help="A training config with a checkpoint; with --corpus a checkpoint.")
    ],
    *,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    corpus: Annotated[Path | None, typer.Option(help="Another corpus folder.")] = None,
    context_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Length of windows; default: [train], or the model's context."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 1,
    shard_bytes: Annotated[
        int, typer.Option(min=1, help="Bytes of text in a file; what a stopped run may lose.")
    ] = 64_000_000,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a corpus with the patches of a trained scorer, to train on.

    Run it again to go on after an interruption.
    """
    config = training_config(find_source(source), corpus, context_bytes).with_run(device=device)
    with progress_bar() as bar:
        task = bar.add_task("patches (kB)", total=None)
        found = run(
            config,
            out,
            workers=workers,
            shard_bytes=shard_bytes,
            progress=lambda done, total: bar.update(
                task, completed=done // 1000, total=total // 1000
            ),
        )
    if as_json:
        typer.echo(json.dumps({"out": str(out), **attrs.asdict(found)}))
    else:
        typer.echo(describe(found))
        typer.echo(f"prepared: {out}")


def training_config(config: Config, corpus: Path | None, context_bytes: int | None) -> Config:
    """A config that trains on what is to be prepared. Raises ConfigError without a checkpoint."""
    if config.checkpoint is None:
        text = "missing; only a trained scorer has patches to prepare"
        raise ConfigError([config.tables.place.child("run", "checkpoint").problem(text)])
    train = config.tables.get("train", {"steps": 1})
    if context_bytes is not None and isinstance(train, dict):
        train = {**train, "context_bytes": context_bytes}
    config = config.with_table("train", train)
    return config if corpus is None else with_corpus(config, corpus)


def describe(found: Prepared) -> str:
    """What was done, on one line."""
    speed = found.bytes_per_second
    rate = "nothing was left to do" if speed is None else f"{speed / 1000:.1f} kB/s"
    return (
        f"{found.documents} documents, {found.bytes} bytes in {found.shards} shards "
        f"({found.kept} kept), patches of {found.mean_patch_bytes:.2f} bytes, {rate}"
    )
