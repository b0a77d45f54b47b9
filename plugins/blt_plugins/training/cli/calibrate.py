"""``blt calibrate``; what needs torch is imported once it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
import typer

from blt_core.cli.inputs import JsonOption
from blt_core.cli.streams import console, output_json
from blt_core.plugins.loading import load_plugins
from blt_plugins.training.run.interrupts import stopped_at_once

if TYPE_CHECKING:
    from blt_plugins.training.scores.calibration import Calibration

#: Rows of the histogram, and the width of its longest bar.
_ROWS, _BAR = 16, 40


@stopped_at_once("run the same command again")
def calibrate(
    source: Annotated[str, typer.Argument(help="A checkpoint, or a config that names one.")],
    files: Annotated[list[Path], typer.Argument(help="Text like that the model will see.")],
    *,
    target: Annotated[float, typer.Option(help="Mean patch length in bytes.")] = 4.0,
    write: Annotated[
        bool, typer.Option("--write", help="Store the threshold in the checkpoint folder.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the patch threshold for a mean patch length, and show how long patches get."""
    from blt_plugins.training.cli.threshold import calibrate_source, write_threshold

    plugins = load_plugins()
    found = calibrate_source(source, files, target, plugins)
    if write:
        write_threshold(source, found.threshold, plugins)
    if as_json:
        output_json({**attrs.asdict(found), "reached": found.reached})
    else:
        _show(found)


def _show(found: Calibration) -> None:
    from rich.table import Table

    shown = console(100)
    shown.print(f"threshold = {found.threshold}  # nats")
    missed = "" if found.reached else f" ({found.target_patch_bytes:g} is out of reach)"
    shown.print(
        f"mean patch length: {found.mean_patch_bytes:.2f} bytes{missed}, "
        f"{found.patches} patches in {found.bytes} bytes"
    )
    table = Table(box=None, header_style="bold")
    for name in ("bytes", "patches", "share"):
        table.add_column(name, justify="right")
    table.add_column()
    rows = histogram_rows(found.histogram)
    highest = max(count for _, count in rows)
    for label, count in rows:
        table.add_row(label, str(count), f"{count / found.patches:.1%}", _bar(count / highest))
    shown.print(table)


def histogram_rows(histogram: Mapping[int, int]) -> list[tuple[str, int]]:
    """Lengths and counts to show; lengths above the last row's are counted together."""
    rows = [(str(size), histogram.get(size, 0)) for size in range(1, _ROWS + 1)]
    longer = sum(count for size, count in histogram.items() if size > _ROWS)
    last = min(max(histogram), _ROWS)
    return rows[:last] + ([(f"{_ROWS + 1}+", longer)] if longer else [])


def _bar(share: float) -> str:
    """A bar of eighths of a character."""
    eighths = round(_BAR * 8 * share)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
