"""``blt prepare``: a corpus with its patches, written once for many runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
import typer

from blt_core.cli.inputs import (
    DeviceOption,
    ExecutorOption,
    JsonOption,
    find_source,
    with_executor,
)
from blt_core.cli.progress import progress_bar
from blt_core.cli.streams import output, output_json
from blt_core.errors import ConfigError
from blt_core.plugins.loading import load_plugins
from blt_core.protocols import MODEL_KINDS
from blt_core.wiring.config import Config
from blt_plugins.training.run.interrupts import stopped_at_once

if TYPE_CHECKING:
    from blt_plugins.training.data.prepare import Prepared


@stopped_at_once("run the same command again to go on")
def prepare(  # noqa: PLR0913 -- one parameter an option
    source: Annotated[
        str,
        typer.Argument(
            help="A training config with a checkpoint, or with --corpus a checkpoint; "
            "of a model, or of a scorer that was trained alone."
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    corpus: Annotated[Path | None, typer.Option(help="Another corpus folder.")] = None,
    context_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Length of windows; default: [train], or the model's context."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes: --executor 'local workers=N'.")
    ] = None,
    executor: ExecutorOption = None,
    shard_bytes: Annotated[
        int, typer.Option(min=1, help="Bytes of text in a file; what a stopped run may lose.")
    ] = 64_000_000,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a corpus with the patches of a trained scorer, to train on.

    Run it again to go on after an interruption.
    """
    from blt_plugins.training.data.prepare import prepare as run

    if workers is not None:
        if executor is not None:
            raise typer.BadParameter("does not go with --executor", param_hint="--workers")
        executor = f"local workers={workers}"
    config = training_config(find_source(source), corpus, context_bytes).with_run(device=device)
    config = with_executor(config, executor)
    with progress_bar() as bar:
        task = bar.add_task("patches (kB)", total=None)
        found = run(
            config,
            out,
            shard_bytes=shard_bytes,
            progress=lambda done, total: bar.update(
                task, completed=done // 1000, total=total // 1000
            ),
        )
    if as_json:
        output_json({"out": str(out), **attrs.asdict(found)})
    else:
        output(describe(found))
        output(f"prepared: {out}")


def training_config(config: Config, corpus: Path | None, context_bytes: int | None) -> Config:
    """A config whose scorer is trained, on what is to be prepared.

    Raises ConfigError without a checkpoint, CheckpointError for one that cannot be read.
    """
    from blt_plugins.training.setup.config import scorer_checkpoint, with_corpus

    config = _with_scorer_alone(config)
    if config.checkpoint is None and scorer_checkpoint(config) is None:
        text = "missing; only a trained scorer has patches to prepare"
        hint = "or give train.scorer.checkpoint, a scorer that was trained alone"
        raise ConfigError([config.tables.place.child("run", "checkpoint").problem(text, hint)])
    if "train" not in config.tables:
        config = config.with_table("train", {"steps": 1})
    if context_bytes is not None:
        config = config.with_options("train", {"context_bytes": context_bytes})
    return config if corpus is None else with_corpus(config, corpus)


def _with_scorer_alone(config: Config) -> Config:
    """The config with its checkpoint in ``train.scorer``, if that is of a scorer alone.

    ``[model]`` comes from that checkpoint too, where the config has none.
    """
    from blt_core.loading import read_checkpoint

    location, run = config.checkpoint, config.tables.get("run")
    train = config.tables.get("train", {})
    if location is None or not isinstance(run, Mapping) or not isinstance(train, Mapping):
        return config
    stored, _ = read_checkpoint(location, load_plugins())
    if [kind for kind in MODEL_KINDS if kind in stored] != ["patcher"]:
        return config
    own = train.get("scorer", {})
    scorer = {**(own if isinstance(own, Mapping) else {}), "checkpoint": location}
    config = config.with_table("run", {k: v for k, v in run.items() if k != "checkpoint"})
    config = config.with_table("model", config.tables.get("model", stored.get("model", {})))
    return config.with_table("train", {**train, "scorer": scorer})


def describe(found: Prepared) -> str:
    """What was done, on one line."""
    speed = found.bytes_per_second
    rate = "nothing was left to do" if speed is None else f"{speed / 1000:.1f} kB/s"
    return (
        f"{found.documents} documents, {found.bytes} bytes in {found.shards} shards "
        f"({found.kept} kept), patches of {found.mean_patch_bytes:.2f} bytes, {rate}"
    )
