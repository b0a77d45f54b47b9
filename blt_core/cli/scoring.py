"""``blt score``: how likely texts are, byte by byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blt_core.cli import inputs
from blt_core.cli.progress import item_progress, report_items
from blt_core.cli.streams import console, output_json
from blt_core.errors import DataError

if TYPE_CHECKING:
    from blt_core.scoring import Score


def score(  # noqa: PLR0913 -- one parameter an option
    files: Annotated[list[str] | None, typer.Argument(help="Texts to score; - is stdin.")] = None,
    *,
    config: Annotated[
        str, typer.Option("--config", help="A config file, or the name of a shipped one.")
    ] = inputs.DEMO,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What each text continues; it is not scored.")
    ] = None,
    texts_file: Annotated[
        Path | None, typer.Option("--texts", help="JSON Lines of texts; needs --output.")
    ] = None,
    output_file: inputs.OutputOption = None,
    batch: inputs.BatchOption = None,
    executor: inputs.ExecutorOption = None,
    top: Annotated[int, typer.Option(min=0, help="Tell so many likeliest bytes a place.")] = 0,
    checkpoint: inputs.CheckpointOption = None,
    device: inputs.DeviceOption = None,
    dtype: inputs.DtypeOption = None,
    as_json: inputs.JsonOption = False,
) -> None:
    """Score texts: the log-probability of each byte, in nats, and bits per byte."""
    from blt_core.pipeline import Pipeline

    settings = inputs.find_config(config).with_run(
        checkpoint=checkpoint, device=device, dtype=dtype
    )
    inputs.check_files("--texts", texts_file, output_file, {"FILES": files, "--prompt": prompt})
    inputs.refuse_executor(executor, "--texts", texts_file)
    settings = inputs.with_executor(settings, executor)
    if texts_file is not None and output_file is not None:
        from blt_core.batch_inference import score_file

        pipeline = Pipeline.load(inputs.with_sampler(settings, "ar"))
        with item_progress("score", output_file) as watch:
            outcome = score_file(
                pipeline, texts_file, output_file, batch=batch or 1, top=top, watch=watch
            )
        report_items(outcome, output_file)
        return
    if not files:
        raise DataError(
            "no text: name files, - for stdin, or --texts FILE.jsonl --output OUT.jsonl"
        )
    if batch is not None:
        raise typer.BadParameter("goes with --texts", param_hint="--batch")
    texts = [inputs.read_text(path) for path in files]
    # Whatever the sampler needs, scores do not.
    pipeline = Pipeline.load(inputs.with_sampler(settings, "ar"))
    scores = pipeline.score(texts, prompts=prompt or "", top=top)
    if as_json:
        for path, found in zip(files, scores, strict=True):
            output_json({"file": path, **found.to_dict()})
    else:
        _show(files, scores)


def _show(files: Sequence[str], scores: Sequence[Score]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("bytes", "nats", "bits per byte", "without EOS"):
        table.add_column(name, justify="right")
    table.add_column("file")
    for path, found in zip(files, scores, strict=True):
        bits = (found.bits_per_byte, found.bits_per_byte_without_eos)
        shown = ["–" if each is None else f"{each:.4f}" for each in bits]
        table.add_row(str(len(found.text)), f"{-found.logprob:.2f}", *shown, path)
    console(100).print(table)
