"""``blt plugins`` and ``blt check``: what is installed, and what a config means."""

from __future__ import annotations

from typing import Annotated, Any

import attrs
import tomli_w
import typer

from blt_core.cli import inputs
from blt_core.cli.describing import check_kind, describe, find_entries, show
from blt_core.cli.streams import console, output, output_json
from blt_core.component import Preset
from blt_core.errors import PluginError
from blt_core.plugins.commands import find_commands
from blt_core.plugins.entry_points import BrokenPlugin
from blt_core.plugins.loading import Plugins, load_plugins
from blt_core.plugins.registry import Entry
from blt_core.wiring.config import without_none


def plugins(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KIND | show KIND NAME | test KIND NAME]",
            help="Only this kind, with all keys; all about one component; or try its contracts.",
        ),
    ] = None,
    *,
    keys: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="test: keys of its table, as for --sampler. Repeats."
        ),
    ] = None,
    profile: Annotated[
        str,
        typer.Option(
            "--profile", help="test: dev is quick, ci tries more, nightly most; or a number."
        ),
    ] = "dev",
    contracts: Annotated[
        list[str] | None,
        typer.Option("--contract", metavar="NAME", help="test: this one alone. Repeats."),
    ] = None,
    as_json: inputs.JsonOption = False,
) -> None:
    """List the installed components by kind, and the plugins that are broken.

    blt plugins test KIND NAME tries a component on each contract of its kind; exit code 1 if it
    breaks one.
    """
    loaded = load_plugins()
    if (what or [])[:1] == ["test"]:
        from blt_core.cli.trying import try_contracts

        try_contracts(loaded, what or [], keys or [], profile, contracts or [], as_json=as_json)
        return
    if keys or contracts:
        option = "--set" if keys else "--contract"
        raise PluginError(f"{option} is for blt plugins test KIND NAME")
    kind: str | None = None
    match what or []:
        case ["show", of_kind, name]:
            _describe(loaded, of_kind, name, as_json=as_json)
            return
        case ["show", *_]:
            raise PluginError("expected blt plugins show KIND NAME")
        case [_, surplus, *_]:
            raise PluginError(f"unexpected {surplus!r}; expected blt plugins [KIND]")
        case names:
            kind = names[0] if names else None
    if kind is not None:
        check_kind(loaded, kind)
    if as_json:
        output_json(_listing(loaded, kind))
    else:
        _show(loaded, kind)


def check(
    config: inputs.ConfigArgument = inputs.DEMO,
    *,
    sampler: Annotated[
        str | None,
        typer.Option("--sampler", help="As for generate.", autocompletion=inputs.complete_sampler),
    ] = None,
    checkpoint: inputs.CheckpointOption = None,
    as_json: inputs.JsonOption = False,
) -> None:
    """Check a config and print it with every key, presets expanded. Builds nothing."""
    from blt_core.loading import plan_run, warn_of_blocks

    settings = inputs.find_config(config).with_run(checkpoint=checkpoint)
    settings, plugins = inputs.with_sampler(settings, sampler), load_plugins()
    tables = plugins.check(settings)
    if tables is None:
        plan, _ = plan_run(settings, plugins)
        inputs.show_notes(plan)
        warn_of_blocks(plan)
        tables = plan.describe()
    tables = without_none(tables)
    if as_json:
        output_json(tables)
    else:
        output(tomli_w.dumps(tables).rstrip("\n"))


def _describe(loaded: Plugins, kind: str, name: str, *, as_json: bool) -> None:
    """One component, or all of that name if several distributions supply it."""
    found = [describe(loaded, entry) for entry in find_entries(loaded, kind, name)]
    for description in found:
        if as_json:
            output_json(description)
        else:
            show(description)


def _listing(loaded: Plugins, kind: str | None) -> dict[str, Any]:
    return {
        "components": [
            {
                "kind": entry.record.kind,
                "name": entry.record.name,
                "summary": entry.record.summary,
                "preset": isinstance(entry.record, Preset),
                "status": loaded.registry.status(entry),
                "distribution": entry.origin.distribution,
                "keys": _keys(entry),
            }
            for entry in loaded.registry.entries
            if kind in (None, entry.record.kind)
        ],
        "broken": [str(broken) for broken in _broken(loaded)],
    }


def _show(loaded: Plugins, kind: str | None) -> None:
    from rich.table import Table

    order = list(loaded.manifest.kinds)
    entries = sorted(
        (e for e in loaded.registry.entries if kind in (None, e.record.kind)),
        key=lambda e: (order.index(e.record.kind), e.record.name),
    )
    columns = {
        "kind": [entry.record.kind for entry in entries],
        "name": [entry.record.name for entry in entries],
        "from": [entry.origin.distribution for entry in entries],
        "status": [loaded.registry.status(entry) for entry in entries],
        "what it is": [entry.record.summary for entry in entries],
    }
    if set(columns["status"]) <= {"ok"}:
        del columns["status"]
    if kind is not None:
        columns["keys"] = [", ".join(_keys(entry)) or "–" for entry in entries]
    table = Table(box=None, header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    shown = console(120)
    shown.print(table)
    for broken in _broken(loaded):
        shown.print(str(broken), style="red")


def _broken(loaded: Plugins) -> list[BrokenPlugin]:
    """Plugins and commands that cannot be used."""
    return [*loaded.broken, *find_commands(loaded.manifest).broken()]


def _keys(entry: Entry) -> list[str]:
    return [field.name for field in attrs.fields(entry.record.params)]
