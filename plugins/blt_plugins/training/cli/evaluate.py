"""``blt evaluate``: what a model scores on held-out text, as a language model and as a drafter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer

from blt_core.cli.inputs import (
    DeviceOption,
    DtypeOption,
    ExecutorOption,
    JsonOption,
    find_scale,
    find_source,
    refuse_executor,
    with_executor,
)
from blt_core.cli.progress import progress_bar
from blt_core.cli.streams import console, output_json
from blt_core.errors import DataError, RunError
from blt_core.storage.texts import read_document, visible_files
from blt_plugins.training.run.interrupts import stopped_at_once

if TYPE_CHECKING:
    from blt_core.wiring.config import Config
    from blt_plugins.training.data.windows import Batch
    from blt_plugins.training.scores.acceptance import Acceptance
    from blt_plugins.training.scores.accuracy import BlockAccuracy
    from blt_plugins.training.scores.held_out import HeldOut

#: Samplers whose drafts are judged, by whether the decoder denoises.
DRAFTS = ("blt-s draft_bytes=16",)
BLOCK_DRAFTS = tuple(
    f"blt-dv block_bytes={{}} start={start} closure={closure}"
    for start, closure in (("aligned", "none"), ("frontier", "none"), ("frontier", "forced"))
)
#: Bytes of blocks where the decoder does not tell what it was trained on.
BLOCK_BYTES = 16


@attrs.frozen
class Evaluation:
    """All scores of one model. blocks: empty for a decoder that does not denoise."""

    held_out: HeldOut
    blocks: tuple[BlockAccuracy, ...]
    acceptance: tuple[Acceptance, ...]


@stopped_at_once("run the same command again; with --out a task goes on from what it has")
def evaluate(  # noqa: PLR0913 -- one parameter an option
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="A checkpoint, demo:NAME, or a config.")],
    files: Annotated[
        list[Path] | None, typer.Argument(help="Held-out files, or folders of them.")
    ] = None,
    *,
    max_bytes: Annotated[int, typer.Option(min=1, help="Score at most about this much.")] = 60_000,
    context_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Length of windows; default: the model's context."),
    ] = None,
    block_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Bytes of the blocks; default: the longest trained ones, or 16."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help='In place of FILES: "translation pairs=FILE" (repeatable).'),
    ] = None,
    sampler: Annotated[
        list[str] | None,
        typer.Option(
            "--sampler", help="Judge its drafts; of a task: generate with it. Repeatable."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Items of each part of a task: evenly spaced, or the first."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts of a task that run together.")] = 16,
    timed: Annotated[
        int, typer.Option(min=0, help="Prompts of a task to time one by one besides.")
    ] = 0,
    cost_parameters: Annotated[
        str | None,
        typer.Option(help="Price with the paper's sizes: 1b or 3b. Default: the model's own."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Keep a task's answers in this folder; a run that was stopped goes on."),
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Let tasks run what the model wrote.")
    ] = False,
    unsafe_no_sandbox: Annotated[
        bool,
        typer.Option("--unsafe-no-sandbox", help="Without the sandbox."),
    ] = False,
    plot: Annotated[
        str | None, typer.Option(help="Draw scores against cost: a .png or .svg file.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="Drafts judged of each sampler.")] = 256,
    seed: Annotated[
        int, typer.Option(min=0, help="Of windows, blocks and prefixes; of a task's intervals.")
    ] = 0,
    executor: ExecutorOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model on held-out text, or on tasks: quality beside cost."""
    _refuse_misplaced(context, "--task" if task else "FILES")
    refuse_executor(executor, "--task", task)
    settings = find_source(source).with_run(device=device, dtype=dtype)
    settings = with_executor(settings, executor)
    if task:
        if files:
            raise DataError("FILES go without --task; a task's data is a key of it, as pairs=FILE")
        from blt_core.evaluation.command import evaluate_tasks
        from blt_core.evaluation.options import RunOptions

        options = RunOptions(
            limit=limit,
            batch=batch,
            timed=timed,
            seed=seed,
            parameters=find_scale(cost_parameters),
            folder=out,
            allow_code=allow_code_execution,
            unsafe=unsafe_no_sandbox,
        )
        evaluate_tasks(settings, task, sampler or (), options, plot=plot, as_json=as_json)
        return
    if not files:
        raise DataError("nothing to score: give held-out FILES, or --task")
    result = _evaluate(
        settings,
        source,
        files,
        sampler or (),
        HeldOutOptions(
            max_bytes=max_bytes,
            context_bytes=context_bytes,
            block_bytes=block_bytes,
            rounds=rounds,
            seed=seed,
        ),
    )
    if as_json:
        output_json({"source": source, **as_record(result)})
    else:
        _show(result)


#: Options that only one of the two ways to evaluate takes.
_OWN = {
    "FILES": ("max_bytes", "context_bytes", "block_bytes", "rounds"),
    "--task": (
        "limit",
        "batch",
        "timed",
        "cost_parameters",
        "out",
        "plot",
        "allow_code_execution",
        "unsafe_no_sandbox",
    ),
}


def _refuse_misplaced(context: typer.Context, way: str) -> None:
    """Raise DataError for an option that was given and belongs to the other way to evaluate."""
    for other, names in _OWN.items():
        for name in names if other != way else ():
            found = context.get_parameter_source(name)
            if found is not None and found.name == "COMMANDLINE":
                option = f"--{name.replace('_', '-')}"
                raise DataError(f"{option}: goes with {other}, not with {way}; leave it out")


@attrs.frozen(kw_only=True)
class HeldOutOptions:
    """How held-out text is scored; see the options of the command."""

    max_bytes: int
    context_bytes: int | None
    block_bytes: int | None
    rounds: int
    seed: int


def _evaluate(
    settings: Config,
    source: str,
    files: Sequence[Path],
    sampler: Sequence[str],
    options: HeldOutOptions,
) -> Evaluation:
    from blt_plugins.training.cli.threshold import BATCH_BYTES, load_trained
    from blt_plugins.training.data.prefixes import PREFIX_BYTES, batched, prefixes
    from blt_plugins.training.data.windows import Texts, cut_windows, make_batch, pack, sample
    from blt_plugins.training.scores.acceptance import GREEDY, MOST_BYTES, acceptance
    from blt_plugins.training.scores.accuracy import STARTS, block_accuracy
    from blt_plugins.training.scores.held_out import evaluate_model

    pipeline = load_trained(settings)
    model, documents = pipeline.model, Texts(read_documents(files))
    limit = model.context_bytes
    context = limit if options.context_bytes is None else options.context_bytes
    if context > limit:
        raise DataError(f"--context-bytes: {context} is more than the model serves ({limit})")
    denoises = bool(getattr(model.decoder, "denoises", False))
    trained = getattr(pipeline.plan.node("decoder").params, "block_bytes", None)
    size = options.block_bytes or max(trained or (BLOCK_BYTES,))
    samplers = sampler or [*DRAFTS, *(each.format(size) for each in BLOCK_DRAFTS if denoises)]
    longest = min(context, PREFIX_BYTES, limit - min(MOST_BYTES, limit // 2))
    wanted = options.rounds if limit > 1 else 0
    prompts = prefixes(documents, wanted, longest=longest, seed=options.seed) if wanted else []
    for spec in samplers:
        pipeline.with_sampler(spec).check(prompts or [b""], max_new_bytes=1, **GREEDY)
    windows = sample(cut_windows(documents, context), options.max_bytes, options.seed)
    batches = [make_batch(documents, group, model.scheme) for group in pack(windows, BATCH_BYTES)]
    with progress_bar() as bar:

        def tracked(what: str) -> Iterable[Batch]:
            return (batch.to(model.device) for batch in bar.track(batches, description=what))

        held_out = evaluate_model(model, tracked("bits per byte"))
        check_score(held_out, source)
        return Evaluation(
            held_out=held_out,
            blocks=tuple(
                block_accuracy(model, tracked(f"{starts} blocks"), size, starts, seed=options.seed)
                for starts in STARTS
                if denoises
            ),
            acceptance=tuple(
                acceptance(pipeline, spec, bar.track(batched(prompts), description=spec))
                for spec in samplers
                if prompts
            ),
        )


def check_score(held_out: HeldOut, source: str) -> None:
    """Raise RunError for a score that is no finite number, which no draft can be judged beside."""
    if not math.isfinite(held_out.bits_per_byte):
        raise RunError(
            f"{source}: the held-out score is {held_out.bits_per_byte} bits per byte\n"
            "  fix: the model's weights are damaged, or it gives some byte no probability; take "
            "another checkpoint, or train it anew"
        )


def read_documents(paths: Sequence[Path]) -> list[bytes]:
    """Files, and those below folders as a corpus takes them; DataError for unreadable ones."""
    found: list[Path] = []
    for path in paths:
        found += visible_files(path) if path.is_dir() else [path]
    documents = [text for path in found if (text := read_document(path))]
    if not documents:
        raise DataError("no held-out text: there is no file, or all files are empty")
    return documents


def as_record(result: Evaluation) -> dict[str, Any]:
    """The stable JSON form of an evaluation; documented in docs/cli.md."""
    return {
        **attrs.asdict(result.held_out),
        "blocks": [{**attrs.asdict(each), "ratios": each.ratios} for each in result.blocks],
        "acceptance": [
            {
                **attrs.asdict(each),
                "accepted_share": each.accepted_share,
                "bytes_per_round": each.bytes_per_round,
                "by_place": each.by_place,
            }
            for each in result.acceptance
        ],
    }


def _show(result: Evaluation) -> None:
    from rich.table import Table

    shown = console(120)
    score = result.held_out
    shown.print(
        f"{score.bits_per_byte:.4f} bits per byte, top-1 {score.top1:.1%} "
        f"({score.bytes} held-out bytes, patches of {score.mean_patch_bytes:.2f} bytes)"
    )
    for each in result.blocks:
        shown.print(
            f"\n{each.starts} blocks, all masked: right bytes by place, beside the model's own"
        )
        table = Table(box=None, header_style="bold")
        for name in ("place", "bytes", "masked", "autoregressive", "ratio"):
            table.add_column(name, justify="right")
        columns = zip(each.counts, each.masked, each.autoregressive, each.ratios, strict=True)
        for place, (count, masked, own, ratio) in enumerate(columns):
            shares = (_show_number(masked, ".1%"), _show_number(own, ".1%"))
            table.add_row(str(place + 1), str(count), *shares, _show_number(ratio, ".2f"))
        shown.print(table)
    if not result.acceptance:
        return
    shown.print("\none draft after each of many held-out prefixes, and how many stand to a place")
    table = Table(box=None, header_style="bold")
    table.add_column("sampler")
    for name in ("drafts", "accepted", "bytes a round", *(f"to {place}" for place in PLACES)):
        table.add_column(name, justify="right")
    for drafts in result.acceptance:
        stood = dict(enumerate(drafts.by_place, start=1))
        table.add_row(
            drafts.sampler,
            str(drafts.rounds),
            _show_number(drafts.accepted_share, ".1%"),
            _show_number(drafts.bytes_per_round, ".2f"),
            *(_show_number(stood.get(place), ".0%") for place in PLACES),
        )
    shown.print(table)


#: Places of a draft that the table shows.
PLACES = (1, 4, 8, 16)


def _show_number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
