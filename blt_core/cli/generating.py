"""``blt generate``: continue prompts, streaming bytes to stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blt_core.cli import inputs
from blt_core.cli.progress import item_progress, report_items
from blt_core.cli.streams import output, output_json, results

if TYPE_CHECKING:
    from blt_core.pipeline import Generation, Pipeline


def generate(  # noqa: PLR0913 -- one parameter an option
    config: inputs.ConfigArgument = inputs.DEMO,
    *,
    prompt: inputs.PromptOption = None,
    prompt_file: inputs.PromptFileOption = None,
    max_new_bytes: inputs.MaxNewBytesOption = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            "--sampler",
            help='As "blt-s draft_bytes=8".',
            autocompletion=inputs.complete_sampler,
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: inputs.TopKOption = None,
    top_p: inputs.TopPOption = None,
    seed: inputs.SeedOption = None,
    samples: inputs.SamplesOption = None,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, help="With --json: log-probabilities, and those of the k likeliest."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="End after this text in the output (repeatable)."),
    ] = None,
    checkpoint: inputs.CheckpointOption = None,
    device: inputs.DeviceOption = None,
    dtype: inputs.DtypeOption = None,
    compile_passes: inputs.CompileOption = None,
    kernels: inputs.KernelsOption = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", help="JSON Lines of prompts; needs --output.")
    ] = None,
    output_file: inputs.OutputOption = None,
    batch: inputs.BatchOption = None,
    executor: inputs.ExecutorOption = None,
    as_json: inputs.JsonOption = False,
) -> None:
    """Continue prompts with a byte-latent model; without CONFIG, the demo of Python code."""
    from blt_core.pipeline import Pipeline

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
        compile=compile_passes,
        kernels=kernels,
    )
    inputs.check_files(
        "--prompts", prompts_file, output_file, {"--prompt": prompt, "--prompt-file": prompt_file}
    )
    inputs.refuse_executor(executor, "--prompts", prompts_file)
    settings = inputs.with_executor(settings, executor)
    pipeline = Pipeline.load(inputs.with_sampler(settings, sampler))
    if prompts_file is not None and output_file is not None:
        from blt_core.batch_inference import generate_file

        pipeline.check([b""], samples=samples, logprobs=logprobs)
        inputs.note_idle(pipeline, top_k=top_k, top_p=top_p, seed=seed, samples=samples)
        inputs.show_notes(pipeline.plan)
        with item_progress("generate", output_file) as watch:
            outcome = generate_file(
                pipeline,
                prompts_file,
                output_file,
                batch=batch or 1,
                samples=samples,
                logprobs=logprobs,
                watch=watch,
            )
        report_items(outcome, output_file)
        return
    prompts = inputs.read_prompts(prompt, prompt_file, pipeline.model.context_bytes)
    pipeline.check(prompts, logprobs=logprobs)
    inputs.note_idle(pipeline, top_k=top_k, top_p=top_p, seed=seed, samples=samples)
    inputs.show_notes(pipeline.plan)
    if logprobs is not None and not as_json:
        raise typer.BadParameter("--json shows them", param_hint="--logprobs")
    seeds = [request.seed for request in pipeline.requests(prompts)]
    if batch or as_json or samples is not None:
        size = batch or 1
        for start in range(0, len(prompts), size):
            together = slice(start, start + size)
            for result in pipeline.generate(
                prompts[together], seed=seeds[together], samples=samples or 1, logprobs=logprobs
            ):
                _print_result(result, as_json=as_json)
    else:
        _stream(pipeline, prompts, seeds)


def _print_result(result: Generation, *, as_json: bool) -> None:
    if as_json:
        output_json(result.to_dict())
    else:
        output(result.output + b"\n")


def _stream(pipeline: Pipeline, prompts: Sequence[bytes], seeds: Sequence[int]) -> None:
    """Write each prompt's bytes as they come; on a terminal the prompt is shown before them."""
    terminal = results().isatty()
    for prompt, seed in zip(prompts, seeds, strict=True):
        if terminal:
            output(prompt)
        step = None
        for step in pipeline.steps([prompt], seed=seed):
            output(step.new[0])
        if terminal or len(prompts) > 1:
            output(b"\n")
        if step is not None:
            _report(pipeline.generation(step.progress[0]))


def _report(result: Generation) -> None:
    parts = [
        f"{len(result.output)} bytes",
        f"{result.bytes_per_second:.0f} bytes/s",
        f"N_dec {result.passes.decoder}",
        f"N_enc {result.passes.encoder}",
        f"{result.cost.total:.3g} {result.cost.unit}",
        f"stopped by {result.stop_reason}",
    ]
    if result.drafted:
        parts.insert(4, f"accepted {result.accepted} of {result.drafted}")
    print("[" + ", ".join(parts) + "]", file=sys.stderr)  # noqa: T201 -- no result
