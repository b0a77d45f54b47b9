"""The picture of a comparison: agreement with the reference against cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blt_core.errors import DataError
from blt_core.types import GIGABYTES

if TYPE_CHECKING:
    from blt_core.compare import Row

FORMATS = (".png", ".svg")


def plot_paths(target: str) -> list[Path]:
    """The files that ``--plot TARGET`` writes: TARGET, or with both endings if it has neither.

    Raises DataError for another ending, a missing folder, or where matplotlib is not installed.
    """
    path = Path(target)
    if path.suffix and path.suffix not in FORMATS:
        raise DataError(f"--plot: {target} ends in {path.suffix}; expected .png, .svg or neither")
    if path.is_dir():
        raise DataError(f"--plot: {target} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise DataError(f"--plot: the folder {path.parent} does not exist")
    try:
        import matplotlib as _  # noqa: F401, ICN001 -- only whether it is there
    except ImportError as error:
        raise DataError("--plot needs matplotlib.   fix: pip install 'blt-core[plot]'") from error
    return [path] if path.suffix else [path.with_suffix(ending) for ending in FORMATS]


def plot(rows: Sequence[Row], paths: Sequence[Path]) -> None:
    """Draw every sampler at (relative cost, share of bytes that are the reference's)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The legend has a line for each sampler, as long as its spec; the points need room beside it.
    legend = max(len(row.title) for row in rows) * 0.065 + 0.8
    figure = Figure(figsize=(6 + legend, max(5, 0.16 * len(rows) + 0.8)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    priced = "weight traffic" if rows[0].cost_unit == GIGABYTES else f"cost ({rows[0].cost_unit})"
    for index, row in enumerate(rows):
        at = (row.relative_cost or 0.0, 100 * row.agreement)
        axes.scatter(*at, label=row.title, s=36, zorder=3)
        axes.annotate(
            str(index + 1),
            at,
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xlabel(f"{priced} relative to {rows[0].title}")
    axes.set_ylabel(f"bytes that are those of {rows[0].title}, %")
    axes.set_ylim(-3, 108)
    axes.set_xlim(left=0)
    axes.grid(visible=True, alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    numbered = [f"{index + 1}  {label}" for index, label in enumerate(labels)]
    axes.legend(handles, numbered, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for path in paths:
        spare = path.with_name(f".{path.name}.new")
        figure.savefig(spare, format=path.suffix[1:], dpi=150)
        spare.replace(path)
