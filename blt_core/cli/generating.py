"""``blt generate``: continue prompts, streaming bytes to stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from blt_core.cli import inputs
from blt_core.pipeline import Generation, Pipeline


def add_command(app: typer.Typer) -> None:
    """Add ``generate`` to the command line."""

    @app.command()
    def generate(  # noqa: PLR0913 -- one parameter an option
        config: inputs.ConfigArgument = inputs.DEMO,
        *,
        prompt: inputs.PromptOption = None,
        prompt_file: inputs.PromptFileOption = None,
        max_new_bytes: inputs.MaxNewBytesOption = None,
        sampler: Annotated[
            str | None, typer.Option("--sampler", help='As "blt-s draft_bytes=8".')
        ] = None,
        temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
        top_k: inputs.TopKOption = None,
        top_p: inputs.TopPOption = None,
        seed: inputs.SeedOption = None,
        stop: Annotated[
            list[str] | None,
            typer.Option("--stop", help="End after this text in the output (repeatable)."),
        ] = None,
        checkpoint: inputs.CheckpointOption = None,
        device: inputs.DeviceOption = None,
        dtype: inputs.DtypeOption = None,
        batch: Annotated[bool, typer.Option("--batch", help="All prompts at once.")] = False,
        as_json: inputs.JsonOption = False,
    ) -> None:
        """Continue prompts with a byte-latent model; without CONFIG, the demo of Python code."""
        settings = inputs.find_config(config).with_run(
            max_new_bytes=max_new_bytes,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            checkpoint=checkpoint,
            device=device,
            dtype=dtype,
        )
        pipeline = Pipeline.load(inputs.with_sampler(settings, sampler))
        prompts = inputs.read_prompts(prompt, prompt_file, pipeline.model.context_bytes)
        pipeline.check(prompts)
        inputs.note_idle(pipeline, top_k=top_k, top_p=top_p, seed=seed)
        if batch or as_json:
            groups = [prompts] if batch else [[each] for each in prompts]
            for group in groups:
                for result in pipeline.generate(group):
                    _print_result(result, as_json=as_json)
        else:
            _stream(pipeline, prompts)


def _print_result(result: Generation, *, as_json: bool) -> None:
    if as_json:
        _write(json.dumps(result.to_dict()).encode() + b"\n")
    else:
        _write(result.output + b"\n")


def _stream(pipeline: Pipeline, prompts: Sequence[bytes]) -> None:
    """Write each prompt's bytes as they come; on a terminal the prompt is shown before them."""
    terminal = sys.stdout.isatty()
    for prompt in prompts:
        if terminal:
            _write(prompt)
        step = None
        for step in pipeline.steps([prompt]):
            _write(step.new[0])
        if terminal or len(prompts) > 1:
            _write(b"\n")
        if step is not None:
            _report(pipeline.generation(step.progress[0]))


def _report(result: Generation) -> None:
    parts = [
        f"{len(result.output)} bytes",
        f"{result.bytes_per_second:.0f} bytes/s",
        f"N_dec {result.passes.decoder}",
        f"N_enc {result.passes.encoder}",
        f"{result.cost.gigabytes:.3g} GB",
        f"stopped by {result.stop_reason}",
    ]
    if result.drafted:
        parts.insert(4, f"accepted {result.accepted} of {result.drafted}")
    typer.echo("[" + ", ".join(parts) + "]", err=True)


def _write(data: bytes) -> None:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError as error:
        raise inputs.ReaderGone from error
