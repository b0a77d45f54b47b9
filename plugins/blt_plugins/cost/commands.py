"""``blt cost``: the paper's bandwidth table from its own pass counts, or a price for yours."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from blt_core.cli.streams import console, output, output_json
from blt_core.component import BuildContext
from blt_core.errors import RequestError
from blt_core.published import ROWS, SCALES
from blt_core.types import Passes
from blt_plugins.cost.bandwidth import Bandwidth, BandwidthParams


def cost(
    *,
    n_dec: Annotated[int | None, typer.Option(help="Decoder passes to price.")] = None,
    n_enc: Annotated[int | None, typer.Option(help="Encoder + global passes.")] = None,
    scale: Annotated[str, typer.Option(help="Parameter counts: 1b or 3b.")] = "3b",
    bytes_per_parameter: Annotated[float, typer.Option(help="2 is bf16.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Price passes as weight traffic; without counts, reproduce the paper's GB column."""
    if scale not in SCALES:
        raise RequestError(f"--scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    if not 0 < bytes_per_parameter < math.inf:
        raise RequestError(
            f"--bytes-per-parameter: expected more than 0, got {bytes_per_parameter}"
        )
    if (n_dec is None) != (n_enc is None):
        raise RequestError("--n-dec and --n-enc: give both, or none for the paper's table")
    model = Bandwidth(BandwidthParams(bytes_per_parameter=bytes_per_parameter), BuildContext())
    if n_dec is not None and n_enc is not None:
        _price(model, n_dec, n_enc, scale, as_json=as_json)
    else:
        _reproduce(model, scale, as_json=as_json)


def _price(model: Bandwidth, n_dec: int, n_enc: int, scale: str, *, as_json: bool) -> None:
    if min(n_dec, n_enc) < 0:
        raise RequestError("--n-dec and --n-enc: expected 0 or more")
    price = model.cost(Passes(n_dec, n_enc, n_enc), SCALES[scale])
    if as_json:
        output_json({"gigabytes": price.gigabytes, "lines": dict(price.lines)})
        return
    for name, gigabytes in price.lines.items():
        output(f"{name:>14} {gigabytes:10.2f} GB")
    output(f"{'total':>14} {price.gigabytes:10.2f} GB")


def reproduce(model: Bandwidth, scale: str) -> list[dict[str, Any]]:
    """Each printed row with our price of its passes and the deviation, in percent."""
    rows = []
    for row in ROWS:
        ours = model.cost(row.passes, SCALES[scale]).gigabytes
        rows.append(
            {
                "method": row.method,
                "n_dec": row.passes.decoder,
                "n_enc": row.passes.encoder,
                "printed_gigabytes": row.gigabytes,
                "gigabytes": ours,
                "deviation_percent": 100 * (ours / row.gigabytes - 1),
            }
        )
    return rows


def _reproduce(model: Bandwidth, scale: str, *, as_json: bool) -> None:
    from rich.table import Table

    rows = reproduce(model, scale)
    if as_json:
        output_json({"scale": scale, "rows": rows})
        return
    table = Table(box=None, header_style="bold")
    table.add_column("method")
    for name in ("N_dec", "N_enc", "printed GB", "computed GB", "deviation"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = [str(row["n_dec"]), str(row["n_enc"]), f"{row['printed_gigabytes']:.2f}"]
        figures += [f"{row['gigabytes']:.2f}", f"{row['deviation_percent']:+.2f} %"]
        table.add_row(row["method"], *figures)
    console(100).print(table)
