"""Results of tasks as JSON, as a table, and as a picture of quality against cost."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blt_core.cli.streams import console
from blt_core.evaluation.figures import Interval
from blt_core.evaluation.running import PartResult, Scored
from blt_core.types import GIGABYTES

if TYPE_CHECKING:
    from rich.console import Console


def as_record(result: PartResult) -> dict[str, Any]:
    """The stable JSON form of a part of a task; documented in docs/cli.md."""
    return {
        "task": result.name,
        "items": result.items,
        **result.told,
        "samplers": [_record(each) for each in result.samplers],
    }


def _record(each: Scored) -> dict[str, Any]:
    scores = {name: found.to_dict() for name, found in each.scores.items()}
    return {
        "name": each.name,
        "spec": each.spec,
        "scores": scores,
        "relative_scores": {name: found.to_dict() for name, found in each.of_ar.items()},
        "n_dec": each.passes.decoder if each.passes else None,
        "n_enc": each.passes.encoder if each.passes else None,
        "n_draft": each.passes.draft if each.passes else None,
        "bytes": each.bytes,
        "drafted": each.drafted,
        "accepted": each.accepted,
        "cost": each.cost,
        "cost_unit": each.cost_unit,
        "own_cost": each.own_cost,
        "relative_cost": each.relative_cost,
        "relative_cost_paper": each.relative_cost_paper,
        "gigabytes": each.in_gigabytes(each.cost),
        "own_gigabytes": each.in_gigabytes(each.own_cost),
        "relative_gigabytes": each.in_gigabytes(each.relative_cost),
        "relative_gigabytes_paper": each.in_gigabytes(each.relative_cost_paper),
        "identical_to_ar": each.identical,
        "same_outputs": each.same,
        "outputs": each.outputs,
        "near_ties": each.near_ties,
        "agreement": each.agreement,
        "repeats": each.repeats,
        "bytes_per_second": each.bytes_per_second,
        "errors": each.errors,
        "first_error": each.first_error,
    }


def show(results: Sequence[PartResult], notes: Sequence[str] = ()) -> None:
    """Print a table for each part."""
    shown = console(150)
    said: set[str] = set()
    for number, result in enumerate(results):
        if number:
            shown.print()
        _show(shown, result, said)
    for note in notes:
        shown.print()
        shown.print("\n".join(textwrap.wrap(note, 100)))


def _show(shown: Console, result: PartResult, said: set[str]) -> None:
    """Print a part; of what its task says, that which was not said before."""
    from rich.table import Table

    shown.print(f"{result.name}: {result.items} items")
    for line in _told(result.told):
        if line not in said:
            shown.print(f"  {line}")
        said.add(line)
    generated = result.samplers[0].passes is not None
    table = Table(box=None, header_style="bold")
    table.add_column("sampler", overflow="fold")
    names = list(result.samplers[0].scores)
    unit = result.samplers[0].cost_unit
    passes, agrees = ("N_dec", "N_enc"), ("same", "agreement", "repeats")
    # Prices of other sizes beside those of the model's own.
    others = any(each.own_cost != each.cost for each in result.samplers)
    own = (f"own {unit}",) if others else ()
    costs = (*passes, str(unit), *own, f"rel. {unit}", "paper's", "bytes/s", *agrees)
    for name in (*names, *(costs if generated else ())):
        table.add_column(name, justify="right")
    for each in result.samplers:
        scores = [_interval(each.scores.get(name)) for name in names]
        table.add_row(each.spec, *scores, *(_costs(each, own=others) if generated else ()))
    shown.print(table)
    for each in result.samplers:
        if each.errors:
            text = f"{each.spec}: {each.errors} questions have an error in place of an answer"
            shown.print(f"  {text}, and count as answered with nothing: {each.first_error}")


def _told(told: Mapping[str, Any]) -> Iterator[str]:
    for name, value in told.items():
        if isinstance(value, Mapping):
            each = ", ".join(f"{key} {_fact(item)}" for key, item in value.items())
            yield f"{name.replace('_', ' ')}: {each}"
        else:
            yield f"{name.replace('_', ' ')}: {_fact(value)}"


def _fact(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(found: Interval | None) -> str:
    if found is None:
        return "–"
    value = _short(found.value)
    if found.low is None or found.high is None:
        return value
    return f"{value} ({_short(found.low)} to {_short(found.high)})"


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"  # noqa: PLR2004 -- digits to show


def _costs(each: Scored, *, own: bool) -> list[str]:
    passes = each.passes
    return [
        f"{passes.decoder:,}" if passes else "–",
        f"{passes.encoder:,}" if passes else "–",
        _number(each.cost, ".4g"),
        *([_number(each.own_cost, ".4g")] if own else []),
        _number(each.relative_cost, ".3f"),
        _number(each.relative_cost_paper, ".3f"),
        _number(each.bytes_per_second, ".0f"),
        _same(each),
        _number(each.agreement, ".1%"),
        _number(each.repeats, ".0%"),
    ]


def _same(each: Scored) -> str:
    if each.identical is None:
        return "in law" if each.outputs else "–"
    if each.identical:
        return "yes"
    ties = f" ({each.near_ties} near-ties)" if each.near_ties else ""
    return f"{each.same}/{each.outputs}{ties}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


# -- the picture -----------------------------------------------------------------------------------


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points (cost, score) that no other beats in both, by rising cost: their numbers."""
    best, found = float("-inf"), []
    for number in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[number][1] > best:
            best = points[number][1]
            found.append(number)
    return found


def draw(results: Sequence[PartResult], paths: Sequence[Path]) -> None:
    """Draw the first score of each part against relative cost, a point a sampler."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [result for result in results if _points(result)]
    if not drawn:
        return
    specs = list(dict.fromkeys(each.spec for result in drawn for each in result.samplers))
    legend = max(map(len, specs)) * 0.065 + 0.8
    height = max(4.5, 0.16 * len(specs) + 0.8)
    figure = Figure(figsize=(4.5 * len(drawn) + legend, height), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, result in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        _draw_part(axes, result, specs)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="outside right center")
    for path in paths:
        spare = path.with_name(f".{path.name}.new")
        figure.savefig(spare, format=path.suffix[1:], dpi=150)
        spare.replace(path)


def _points(result: PartResult) -> list[tuple[Scored, tuple[float, float]]]:
    """The samplers that have a cost and a first score, and where they stand."""
    name = next(iter(result.samplers[0].scores), None)
    return [
        (each, (each.relative_cost, each.scores[name].value))
        for each in result.samplers
        if name and each.relative_cost is not None and math.isfinite(each.scores[name].value)
    ]


def _draw_part(axes: Any, result: PartResult, specs: Sequence[str]) -> None:
    name = next(iter(result.samplers[0].scores))
    shown = _points(result)
    points = [at for _, at in shown]
    for each, at in shown:
        number = specs.index(each.spec)
        color, label = f"C{number % 10}", f"{number + 1}  {each.spec}"
        found = each.scores[name]
        if found.low is not None and found.high is not None:
            axes.vlines(at[0], found.low, found.high, color=color, alpha=0.4, linewidth=1)
        axes.scatter(*at, color=color, label=label, s=30, zorder=3)
        axes.annotate(str(number + 1), at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    edge = [points[number] for number in frontier(points)]
    axes.step(*zip(*edge, strict=True), where="post", color="0.6", linewidth=1, zorder=1)
    axes.set_title(f"{result.name}, {result.items} items", fontsize=10)
    unit = result.samplers[0].cost_unit
    priced = "weight traffic" if unit == GIGABYTES else f"cost ({unit})"
    axes.set_xlabel(f"{priced} relative to ar")
    axes.set_ylabel(name)
    axes.set_xlim(left=0)
    axes.grid(visible=True, alpha=0.3)
