"""``blt score``: how likely texts are, byte by byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blt_core.cli import inputs
from blt_core.cli.streams import console, output_json

if TYPE_CHECKING:
    from blt_core.scoring import Score


def score(  # noqa: PLR0913 -- one parameter an option
    files: Annotated[list[str], typer.Argument(help="Texts to score; - is stdin.")],
    *,
    config: Annotated[
        str, typer.Option("--config", help="A config file, or the name of a shipped one.")
    ] = inputs.DEMO,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What each text continues; it is not scored.")
    ] = None,
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
    texts = [inputs.read_text(path) for path in files]
    # Whatever the sampler needs, scores do not.
    pipeline = Pipeline.load(inputs.with_sampler(settings, "ar"))
    scores = pipeline.score(texts, prompts=prompt or "", top=top)
    if as_json:
        for path, found in zip(files, scores, strict=True):
            output_json({"file": path, **as_record(found)})
    else:
        _show(files, scores)


def as_record(found: Score) -> dict[str, Any]:
    """The stable JSON form of a score; documented in docs/cli.md."""
    return {
        "bytes": len(found.text),
        "logprob": found.logprob,
        "eos_logprob": found.eos.logprob,
        "bits_per_byte": found.bits_per_byte,
        "bits_per_byte_without_eos": found.bits_per_byte_without_eos,
        "logprobs": [each.logprob for each in found.likelihoods],
        "top_logprobs": [[list(pair) for pair in each.top] for each in found.likelihoods],
    }


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
