"""``blt compare``: samplers side by side on the same prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer

from blt_core.cli import inputs, plotting
from blt_core.cli.progress import progress_bar
from blt_core.cli.streams import console, output_json
from blt_core.errors import RequestError
from blt_core.types import Parameters

if TYPE_CHECKING:
    from blt_core.compare import Row
    from blt_core.pipeline import Pipeline

DEFAULT_SAMPLERS = ("ar", "blt-s draft_bytes=8", "blt-lookup", "blt-cascade", "blt-auto")


def compare(  # noqa: PLR0913 -- one parameter an option
    config: inputs.ConfigArgument = inputs.DEMO,
    *,
    prompt: inputs.PromptOption = None,
    prompt_file: inputs.PromptFileOption = None,
    max_new_bytes: inputs.MaxNewBytesOption = None,
    sampler: Annotated[
        list[str] | None,
        typer.Option(
            "--sampler",
            help='Repeatable; "label: sampler"; the first is the reference.',
            autocompletion=inputs.complete_sampler,
        ),
    ] = None,
    cost_parameters: Annotated[
        str | None,
        typer.Option(help="Price with the paper's sizes: 1b or 3b. Default: the model's own."),
    ] = None,
    checkpoint: inputs.CheckpointOption = None,
    device: inputs.DeviceOption = None,
    dtype: inputs.DtypeOption = None,
    compile_passes: inputs.CompileOption = None,
    kernels: inputs.KernelsOption = None,
    plot: Annotated[
        str | None, typer.Option(help="Draw agreement against cost: a .png or .svg file.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0, the default, is greedy.")] = 0.0,
    top_k: inputs.TopKOption = None,
    top_p: inputs.TopPOption = None,
    seed: inputs.SeedOption = None,
    samples: inputs.SamplesOption = None,
    as_json: inputs.JsonOption = False,
) -> None:
    """Compare samplers: passes, acceptance, cost, speed, and agreement with the first."""
    from blt_core.compare import compare as compare_samplers
    from blt_core.pipeline import Pipeline

    parameters = inputs.find_scale(cost_parameters)
    pictures = plotting.plot_paths(plot) if plot is not None else []
    settings = inputs.find_config(config).with_run(
        max_new_bytes=max_new_bytes,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        checkpoint=checkpoint,
        device=device,
        dtype=dtype,
        compile=compile_passes,
        kernels=kernels,
    )
    pipeline = Pipeline.load(settings)
    prompts = inputs.read_prompts(prompt, prompt_file, pipeline.model.context_bytes)
    inputs.note_idle(pipeline, top_k=top_k, top_p=top_p, seed=seed, samples=samples)
    samplers = _labelled(sampler) if sampler else _default_samplers(pipeline)
    inputs.show_notes(*map(pipeline.plan_with_sampler, samplers.values()))
    with progress_bar() as bar:
        texts = len(pipeline.requests(prompts, samples=samples))
        task = bar.add_task("", total=len(samplers) * texts)

        def advance(name: str, index: int) -> None:
            begun = (name, index) != (next(iter(samplers)), 0)
            bar.update(task, description=f"{name}, prompt {index + 1}", advance=int(begun))

        rows = compare_samplers(
            pipeline,
            samplers,
            prompts,
            parameters=parameters,
            progress=advance,
            samples=samples,
        )
    if parameters and any(row.passes.draft for row in rows):
        inputs.note("draft models are priced by their own size, whatever --cost-parameters says")
    if pictures:
        plotting.plot(rows, pictures)
    if as_json:
        priced = parameters or pipeline.parameter_counts
        output_json(as_report(rows, len(prompts), priced, pipeline))
    else:
        _show(rows)


#: A label before a sampler, which ends at the first colon and space.
_LABEL = re.compile(r"""([^=:"']+):\s+(.*)""", re.DOTALL)


def _labelled(specs: Sequence[str]) -> dict[str, str | Mapping[str, Any]]:
    """The samplers by label, those without one by themselves; RequestError for a label twice."""
    samplers: dict[str, str | Mapping[str, Any]] = {}
    for given in specs:
        found = _LABEL.fullmatch(given.strip())
        title, spec = (found[1].strip(), found[2]) if found else (given, given)
        if samplers.setdefault(title, spec) != spec:
            raise RequestError(f"--sampler: the label {title!r} is given to two samplers")
    return samplers


def _default_samplers(pipeline: Pipeline) -> dict[str, str | Mapping[str, Any]]:
    """The usual ones, and the config's own sampler if it is none of them."""
    samplers: dict[str, str | Mapping[str, Any]] = {spec: spec for spec in DEFAULT_SAMPLERS}
    own = pipeline.plan.node("sampler").describe()
    known = [pipeline.plan_with_sampler(s).node("sampler").describe() for s in DEFAULT_SAMPLERS]
    return samplers if own in known else {**samplers, f"{pipeline.sampler_name} (config)": own}


def as_report(
    rows: list[Row], prompts: int, parameters: Parameters, pipeline: Pipeline
) -> dict[str, Any]:
    """The stable JSON form of a comparison; documented in docs/cli.md."""
    return {
        "prompts": prompts,
        "max_new_bytes": pipeline.settings.max_new_bytes,
        "dtype": pipeline.settings.dtype,
        "cost_parameters": attrs.asdict(parameters),
        "samplers": [_record(row) for row in rows],
    }


def _record(row: Row) -> dict[str, Any]:
    from blt_core.pipeline import told_rounds

    return {
        "name": row.name,
        "spec": row.spec,
        "settings": row.settings,
        "identical_to_ar": row.identical,
        "near_ties": row.near_ties,
        "agreement": row.agreement,
        "repeats": row.repeats,
        "differences": [attrs.asdict(difference) for difference in row.differences],
        "n_dec": row.passes.decoder,
        "n_enc": row.passes.encoder,
        "n_draft": row.passes.draft,
        "rounds": row.rounds,
        "drafted": row.drafted,
        "accepted": row.accepted,
        **told_rounds(row.counts, row.passes, sum(len(each.ids) for each in row.results)),
        "cost": row.cost,
        "cost_unit": row.cost_unit,
        "relative_cost": row.relative_cost,
        "gigabytes": row.gigabytes,
        "relative_gigabytes": row.relative_gigabytes,
        "bytes_per_second": row.bytes_per_second,
        "relative_speed": row.relative_speed,
        "per_prompt": [result.to_dict() for result in row.results],
    }


def _show(rows: list[Row]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    unit = rows[0].cost_unit
    table.add_column("sampler", overflow="fold")  # cut off, two could look alike
    for name in (
        "bytes",
        "same",
        "N_dec",
        "N_enc",
        "rounds",
        "accepted",
        unit,
        f"rel. {unit}",
        "repeats",
    ):
        table.add_column(name, justify="right")
    table.add_column("bytes/s", justify="right")
    table.add_column("rel. speed", justify="right")
    for row in rows:
        accepted = f"{row.accepted}/{row.drafted}" if row.drafted else "–"
        table.add_row(
            row.title,
            str(sum(len(result.output) for result in row.results)),
            _agreement(row),
            str(row.passes.decoder),
            str(row.passes.encoder),
            str(row.rounds),
            accepted,
            f"{row.cost:.3g}" if row.cost < _WHOLE else f"{row.cost:.0f}",
            _number(row.relative_cost),
            f"{row.repeats:.0%}",
            f"{row.bytes_per_second:.0f}",
            _number(row.relative_speed),
        )
    shown = console(120)
    shown.print(table)
    if slower := [row for row in rows if (row.relative_speed or 1) < _SLOWER]:
        each = ", ".join(f"{row.title} ({row.relative_speed:.2f})" for row in slower)
        shown.print(f"\nslower than {rows[0].title}: {each}")


#: A ratio of speeds that is shown as less than 1.
_SLOWER = 0.995
#: From here on costs are shown whole.
_WHOLE = 100


def _number(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def _agreement(row: Row) -> str:
    if row.in_law:
        return "in law"
    if row.identical:
        return "yes"
    ties = f" ({row.near_ties} near-ties)" if row.near_ties else ""
    return f"{len(row.results) - len(row.differences)}/{len(row.results)}{ties}"
