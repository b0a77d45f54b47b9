"""``blt bench-kernels``: how fast each kernel reads a model's weights on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blt_core.cli import inputs
from blt_core.cli.progress import progress_bar
from blt_core.cli.streams import console, output, output_json

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from blt_core.kernels.choice import Choice, Times


def bench_kernels(
    source: Annotated[
        str, typer.Argument(help="A checkpoint of any format, or a config that names one.")
    ] = inputs.DEMO,
    *,
    dtype: inputs.DtypeOption = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of torch; default: as it is.")
    ] = None,
    build: Annotated[
        bool, typer.Option("--build", help="Compile the native kernel first (20 s, a compiler).")
    ] = False,
    as_json: inputs.JsonOption = False,
) -> None:
    """Measure the kernels for a model's weights, and store the choice that later runs have."""
    import torch

    from blt_core.errors import DataError
    from blt_core.kernels import native
    from blt_core.kernels.machine import read_bandwidth
    from blt_core.kernels.using import remeasured, weights_of
    from blt_core.loading import build_model, plan_run
    from blt_core.plugins.loading import load_plugins

    if threads is not None:
        torch.set_num_threads(threads)
    if build:
        path = native.build()
        inputs.note(f"the native kernel is at {path}")
    config = inputs.find_source(source).with_run(dtype=dtype, kernels="fixed")
    model = build_model(*plan_run(config, load_plugins()))
    weights = weights_of(model.module_dict())
    if not weights:
        raise DataError(
            f"{source}: kernels are chosen for float32 and bfloat16 on a CPU alone\n"
            "  fix: --dtype float32"
        )
    read = read_bandwidth()
    with progress_bar() as bar:
        task = bar.add_task("kernels", total=None)
        choice, times, path = remeasured(
            weights, lambda done, total: bar.update(task, completed=done, total=total)
        )
    record = _record(choice.of(weights), times, weights, read)
    record["stored"] = str(path)
    if as_json:
        output_json(record)
    else:
        _show(record)
    _tell(record, path)


def _record(
    choice: Choice, times: Times, weights: Mapping[str, Sequence[Tensor]], read: float
) -> dict[str, Any]:
    """What was measured, as ``--json`` prints it; speeds in GB/s of weights."""
    import attrs

    from blt_core.kernels.using import copied_bytes

    rows = []
    for name, own in weights.items():
        speeds = {
            rows_class: {kernel: own[0].nbytes / seconds / 1e9 for kernel, seconds in each.items()}
            for rows_class, each in times[name].items()
        }
        chosen = choice.names[name]
        copied = copied_bytes(list(own), set(chosen.values()))
        rows.append(
            {
                "weight": name,
                "count": len(own),
                "bytes": sum(each.nbytes for each in own),
                "gigabytes_per_second": speeds,
                "chosen": dict(chosen),
                "copied_bytes": copied,
            }
        )
    return {
        **attrs.asdict(choice.machine),
        "read_bandwidth": read,
        "native": choice.native,
        "kernels": choice.digest(),
        "weights": rows,
    }


def _show(record: Mapping[str, Any]) -> None:
    from rich.table import Table

    from blt_core.kernels.candidates import KERNELS, ROW_CLASSES

    output(
        f"{record['cpu']}, torch {record['torch']}, {record['threads']} threads; "
        f"GB/s of weights, a plain sum reads {record['read_bandwidth']:.1f}"
    )
    table = Table(box=None, header_style="bold")
    table.add_column("weight (out x in)")
    table.add_column("count", justify="right")
    table.add_column("rows")
    measured = {
        kernel
        for row in record["weights"]
        for each in row["gigabytes_per_second"].values()
        for kernel in each
    }
    kernels = [name for name in KERNELS if name in measured]
    for name in (*kernels, "chosen"):
        table.add_column(name, justify="left" if name == "chosen" else "right")
    for row in record["weights"]:
        head = (row["weight"], str(row["count"]))
        for rows_class in ROW_CLASSES:
            speeds = row["gigabytes_per_second"][rows_class]
            cells = [f"{speeds[name]:.1f}" if name in speeds else "" for name in kernels]
            table.add_row(*head, rows_class, *cells, row["chosen"][rows_class])
            head = ("", "")
    console(120).print(table)


def _tell(record: Mapping[str, Any], path: Path) -> None:
    copied = sum(row["copied_bytes"] for row in record["weights"])
    copies = f"; its copies of weights take {copied / 1e6:.0f} MB" if copied else ""
    inputs.note(f"the choice {record['kernels']} is stored in {path}{copies}")
    if record["native"] is None:
        inputs.note("the native kernel is not built: where a compiler is there, --build does it")
