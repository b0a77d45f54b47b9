"""``blt evaluate --task``: tasks with samplers, quality beside cost."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from blt_core.cli import plotting
from blt_core.cli.inputs import with_sampler
from blt_core.cli.progress import progress_bar
from blt_core.cli.streams import output_json
from blt_core.component import BuildContext
from blt_core.errors import DataError, RunError
from blt_core.evaluation.answering import Begin
from blt_core.evaluation.options import RunOptions
from blt_core.evaluation.reporting import as_record, draw, show
from blt_core.evaluation.running import REFERENCE, PartResult, check_task, run_task
from blt_core.execution import AtHand
from blt_core.pipeline import Pipeline
from blt_core.storage.folders import file_errors
from blt_core.tables.inline import parse_inline
from blt_core.wiring.config import Config
from blt_core.wiring.resolve import build_node, resolve_component

if TYPE_CHECKING:
    from rich.progress import Progress

    from blt_core.evaluation.protocol import Task


@attrs.frozen(eq=False)
class Bar:
    """Tells a progress bar how far work has come."""

    bar: Progress

    def begin(self, what: str, total: int) -> Callable[[int], None]:
        """A line of its own."""
        task = self.bar.add_task(what, total=total)
        return lambda done: self.bar.advance(task, done)


def evaluate_tasks(
    settings: Config,
    specs: Sequence[str],
    samplers: Sequence[str],
    options: RunOptions,
    *,
    plot: str | None,
    as_json: bool,
) -> None:
    """Run tasks, and print what they found. All is checked before any work."""
    pictures = plotting.plot_paths(plot) if plot is not None else []
    # The config's own sampler need not suit the model that an option names.
    pipeline = Pipeline.load(with_sampler(settings, REFERENCE))
    tasks = [build_task(pipeline, spec) for spec in specs]
    for each in samplers:
        pipeline.plan_with_sampler(each)
    for name, task in tasks:
        check_task(name, task, samplers, options)
    generating = any(task.asks == "text" for _, task in tasks)
    if pictures and not generating:
        raise DataError("--plot: draws scores against cost, and no task here generates anything")
    if options.timed and not generating:
        raise DataError("--timed: no task here generates anything")
    if options.folder is not None:
        with file_errors(options.folder, DataError):
            options.folder.mkdir(parents=True, exist_ok=True)
    results: list[PartResult] = []
    with _with_workers(options, pipeline) as served, progress_bar() as bar:
        for name, task in tasks:
            results += run_task(pipeline, name, task, samplers, served, Bar(bar))
    if as_json:
        priced = options.parameters or pipeline.parameter_counts
        output_json(
            {
                "cost_parameters": attrs.asdict(priced),
                "dtype": pipeline.settings.dtype,
                "batch": options.batch,
                "timed": options.timed,
                "seed": options.seed,
                "tasks": [as_record(result) for result in results],
            }
        )
    else:
        show(results)
    if pictures:
        draw(results, pictures)
    _refuse_errors(results)


def _refuse_errors(results: Sequence[PartResult]) -> None:
    """Raise RunError, at the end, where questions have an error in place of an answer."""
    failed = [(part.name, each) for part in results for each in part.samplers if each.errors]
    if failed:
        told = "".join(f"\n  {name}, {each.spec}: {each.errors}" for name, each in failed)
        raise RunError(
            f"questions have an error in place of an answer; they count as empty ones:{told}\n"
            f"  the first: {failed[0][1].first_error}"
        )


@contextlib.contextmanager
def _with_workers(options: RunOptions, pipeline: Pipeline) -> Iterator[RunOptions]:
    """The options, with workers of the config's executor, if it has one."""
    if "executor" not in pipeline.plan.nodes:
        yield options
        return
    model = pipeline.model
    config = pipeline.config_for_workers()
    begin = Begin(AtHand(pipeline), config, model.digest(), model.kernels)
    with pipeline.plan.build("executor").start(begin) as workers:
        yield attrs.evolve(options, workers=workers)


def build_task(pipeline: Pipeline, spec: str) -> tuple[str, Task]:
    """The name of a task that ``--task`` gives, and the task; ConfigError with all its problems."""
    name, colon, rest = spec.strip().partition(":")
    if prefixed := bool(colon and re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name)):
        # "lm-eval:piqa shots=1" is "lm-eval task=piqa shots=1".
        task, _, settings = rest.partition(" ")
        spec = f"{name} task={json.dumps(task)} {settings}"
    table: Any = parse_inline(spec, "task")
    node = resolve_component("task", table, pipeline.plugins, place="--task")
    name = str(node.presets[0] if node.presets else node.name)
    name = f"{name}:{table['task']}" if prefixed else name
    context = BuildContext(pipeline.model.scheme)
    return name, build_node(node, context, pipeline.plugins.registry)
