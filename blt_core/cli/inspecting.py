"""``blt plugins`` and ``blt check``: what is installed, and what a config means."""

from __future__ import annotations

import json
from typing import Annotated, Any

import attrs
import tomli_w
import typer
from rich.console import Console
from rich.table import Table

from blt_core.cli import inputs
from blt_core.component import Preset
from blt_core.errors import PluginError, near_match
from blt_core.pipeline import plan_run
from blt_core.plugins import Plugins, load_plugins


def add_commands(app: typer.Typer) -> None:
    """Add ``plugins`` and ``check`` to the command line."""

    @app.command()
    def plugins(
        kind: Annotated[str | None, typer.Argument(help="Only this kind, with all keys.")] = None,
        *,
        as_json: inputs.JsonOption = False,
    ) -> None:
        """List the installed components by kind, and the plugins that are broken."""
        loaded = load_plugins()
        if kind is not None and kind not in loaded.manifest.kinds:
            kinds = loaded.manifest.kinds
            raise PluginError(
                f"no kind named {kind!r}.{near_match(kind, kinds)}\n  kinds: {', '.join(kinds)}"
            )
        if as_json:
            typer.echo(json.dumps(_listing(loaded, kind)))
        else:
            _show(loaded, kind)

    @app.command()
    def check(
        config: inputs.ConfigArgument = inputs.DEMO,
        *,
        sampler: Annotated[str | None, typer.Option("--sampler", help="As for generate.")] = None,
        checkpoint: inputs.CheckpointOption = None,
        as_json: inputs.JsonOption = False,
    ) -> None:
        """Check a config and print it with every key, presets expanded. Builds nothing."""
        settings = inputs.find_config(config).with_run(checkpoint=checkpoint)
        plan, _ = plan_run(inputs.with_sampler(settings, sampler), load_plugins())
        tables = _without_none(plan.describe())
        typer.echo(json.dumps(tables) if as_json else tomli_w.dumps(tables).rstrip("\n"))


def _listing(loaded: Plugins, kind: str | None) -> dict[str, Any]:
    return {
        "components": [
            {
                "kind": entry.record.kind,
                "name": entry.record.name,
                "summary": entry.record.summary,
                "preset": isinstance(entry.record, Preset),
                "distribution": entry.origin.distribution,
                "keys": [field.name for field in attrs.fields(entry.record.params)],
            }
            for entry in loaded.registry.entries
            if kind in (None, entry.record.kind)
        ],
        "broken": [str(broken) for broken in loaded.broken],
    }


def _show(loaded: Plugins, kind: str | None) -> None:
    table = Table(box=None, header_style="bold")
    for name in ("kind", "name", "from", "what it is"):
        table.add_column(name, overflow="fold")
    if kind is not None:
        table.add_column("keys", overflow="fold")
    order = list(loaded.manifest.kinds)
    entries = sorted(
        loaded.registry.entries, key=lambda e: (order.index(e.record.kind), e.record.name)
    )
    for entry in entries:
        record = entry.record
        if kind not in (None, record.kind):
            continue
        row = [record.kind, record.name, entry.origin.distribution, record.summary]
        if kind is not None:
            row.append(", ".join(field.name for field in attrs.fields(record.params)) or "–")
        table.add_row(*row)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    for broken in loaded.broken:
        console.print(str(broken), style="red", highlight=False)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
