"""``blt cost``, which prices passes, and ``blt calibrate-cost``, which measures what they take."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blt_core.cli import inputs
from blt_core.cli.progress import progress_bar
from blt_core.cli.streams import console, output, output_json
from blt_core.component import BuildContext
from blt_core.errors import RequestError
from blt_core.published import ROWS, SCALES
from blt_core.types import GIGABYTES, Passes
from blt_plugins.cost.bandwidth import Bandwidth, BandwidthParams

if TYPE_CHECKING:
    from blt_core.protocols import CostModel
    from blt_plugins.cost.calibration import Calibration


def cost(
    *,
    n_dec: Annotated[int | None, typer.Option(help="Decoder passes to price.")] = None,
    n_enc: Annotated[int | None, typer.Option(help="Encoder + global passes.")] = None,
    scale: Annotated[str, typer.Option(help="Parameter counts: 1b or 3b.")] = "3b",
    bytes_per_parameter: Annotated[
        float | None, typer.Option(help="2, the default, is bf16.")
    ] = None,
    cost_model: Annotated[
        str | None, typer.Option(help="Another cost model, as --sampler names samplers.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Price passes as weight traffic; without counts, reproduce the paper's GB column."""
    if scale not in SCALES:
        raise RequestError(f"--scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    if bytes_per_parameter is not None and cost_model is not None:
        raise RequestError("--bytes-per-parameter: write it in --cost-model, as bandwidth's key")
    if bytes_per_parameter is not None and not 0 < bytes_per_parameter < math.inf:
        raise RequestError(
            f"--bytes-per-parameter: expected more than 0, got {bytes_per_parameter}"
        )
    if (n_dec is None) != (n_enc is None):
        raise RequestError("--n-dec and --n-enc: give both, or none for the paper's table")
    params = BandwidthParams(bytes_per_parameter=bytes_per_parameter or 2.0)
    model = _built(cost_model) if cost_model else Bandwidth(params, BuildContext())
    if n_dec is not None and n_enc is not None:
        _price(model, n_dec, n_enc, scale, as_json=as_json)
    else:
        _reproduce(model, scale, as_json=as_json)


def calibrate_cost(  # noqa: PLR0913 -- one parameter an option
    source: Annotated[str, typer.Argument(help="A checkpoint, or a config.")] = inputs.DEMO,
    *,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, as in runs.")] = None,
    device: inputs.DeviceOption = None,
    dtype: inputs.DtypeOption = None,
    kernels: inputs.KernelsOption = None,
    compile_passes: inputs.CompileOption = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="A file in place of the user's cache.")
    ] = None,
    as_json: inputs.JsonOption = False,
) -> None:
    """Measure single passes of a model on this machine, for the cost model roofline."""
    import torch

    from blt_core.pipeline import Pipeline
    from blt_plugins.cost.calibration import save
    from blt_plugins.cost.measuring import measure

    if threads is not None:
        torch.set_num_threads(threads)
    run = {"device": device, "dtype": dtype, "kernels": kernels, "compile": compile_passes}
    config = inputs.find_source(source).with_run(**run)
    config = config.with_table("cost_model", {"use": "bandwidth"})
    pipeline = Pipeline.load(config.with_table("sampler", {"use": "ar"}))
    if output_file is not None and output_file.is_dir():
        raise RequestError(f"--output: {output_file} is a folder\n  fix: name a file in it")
    with progress_bar() as bar:
        task = bar.add_task("measuring passes", total=None)
        found = measure(pipeline, source, lambda: bar.advance(task))
    path = save(found, output_file)
    if as_json:
        output_json({"file": str(path), **found.to_json()})
    else:
        _show_calibration(found, path)


def _show_calibration(found: Calibration, path: Path) -> None:
    from rich.table import Table

    rows = (1, 2, 4, 8, 16, 32, 256)
    table = Table(box=None, header_style="bold")
    table.add_column("milliseconds a pass of")
    for count in rows:
        table.add_column(f"{count} rows" if count > 1 else "1 row", justify="right")
    table.add_column("1,000 positions more", justify="right")
    for name, part in found.parts.items():
        if part.alone.points:
            cells = [f"{1e3 * part.alone.at(count):.3g}" for count in rows]
            table.add_row(name, *cells, f"{1e6 * part.context:.3g}")
    table.add_row("engine, true pass", *(f"{1e3 * found.rounds.at(r):.3g}" for r in rows), "")
    table.add_row("engine, draft pass", f"{1e3 * found.draft:.3g}", *[""] * len(rows))
    shown = console(120)
    shown.print(f"{found.machine}", markup=False, highlight=False)
    shown.print(f"reads {found.bandwidth / 1e9:.1f} GB/s, {found.flops / 1e9:.0f} GFLOP/s")
    shown.print(table)
    print(f"[stored in {path}]", file=sys.stderr)  # noqa: T201 -- no result


def _built(spec: str) -> CostModel:
    """The cost model of ``"name key=value"``; ConfigError with all problems."""
    from blt_core.plugins.loading import load_plugins
    from blt_core.tables.inline import parse_inline
    from blt_core.wiring.resolve import build_node, resolve_component

    loaded = load_plugins()
    node = resolve_component("cost_model", parse_inline(spec, "cost_model"), loaded)
    built: CostModel = build_node(node, BuildContext(), loaded.registry)
    return built


def _price(model: CostModel, n_dec: int, n_enc: int, scale: str, *, as_json: bool) -> None:
    if min(n_dec, n_enc) < 0:
        raise RequestError("--n-dec and --n-enc: expected 0 or more")
    price = model.cost(Passes(n_dec, n_enc, n_enc), SCALES[scale])
    if as_json:
        told = {"cost": price.total, "cost_unit": price.unit, "gigabytes": price.gigabytes}
        output_json({**told, "lines": dict(price.lines)})
        return
    for name, part in {**price.lines, "total": price.total}.items():
        figure = f"{part:10.2f}" if price.unit == GIGABYTES else f"{part:10.3g}"
        output(f"{name:>14} {figure} {price.unit}")


def reproduce(model: CostModel, scale: str) -> list[dict[str, Any]]:
    """Each printed row with our price of its passes; the deviation, in percent, of one in GB."""
    rows = []
    for row in ROWS:
        price = model.cost(row.passes, SCALES[scale])
        ours = price.gigabytes
        rows.append(
            {
                "method": row.method,
                "n_dec": row.passes.decoder,
                "n_enc": row.passes.encoder,
                "printed_gigabytes": row.gigabytes,
                "cost": price.total,
                "cost_unit": price.unit,
                "gigabytes": ours,
                "deviation_percent": None if ours is None else 100 * (ours / row.gigabytes - 1),
            }
        )
    return rows


def _reproduce(model: CostModel, scale: str, *, as_json: bool) -> None:
    from rich.table import Table

    rows = reproduce(model, scale)
    if as_json:
        output_json({"scale": scale, "rows": rows})
        return
    table = Table(box=None, header_style="bold")
    table.add_column("method")
    unit = rows[0]["cost_unit"]
    for name in ("N_dec", "N_enc", "printed GB", f"computed {unit}", "deviation"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = [str(row["n_dec"]), str(row["n_enc"]), f"{row['printed_gigabytes']:.2f}"]
        deviation = row["deviation_percent"]
        figures += [f"{row['cost']:.2f}", "–" if deviation is None else f"{deviation:+.2f} %"]
        table.add_row(row["method"], *figures)
    console(100).print(table)
