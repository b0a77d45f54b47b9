"""``blt acme-count``: the parameters of a config's model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blt_core.cli import output, output_json


def count(
    config: Annotated[Path, typer.Argument(help="A TOML file.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Count the parameters of a model, part by part."""
    import attrs

    from blt_core import Pipeline

    counts = attrs.asdict(Pipeline.from_toml(config).parameter_counts)
    if as_json:
        output_json(counts)
    else:
        for part, parameters in counts.items():
            output(f"{part:>14} {parameters:12,}")
