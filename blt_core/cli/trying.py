"""``blt plugins test``: the contracts of a component, tried one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from blt_core.cli.describing import check_kind
from blt_core.cli.streams import console, output_json
from blt_core.errors import PluginError
from blt_core.plugins.loading import Plugins
from blt_core.tables.inline import parse_inline

if TYPE_CHECKING:
    from blt_core.testing import Result


def try_contracts(
    loaded: Plugins,
    what: Sequence[str],
    keys: Sequence[str],
    profile: str,
    only: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Try them and tell how each went. Ends with exit code 1 if one is broken.

    what: ``["test", kind, name]``; keys: ``["draft_bytes=4"]``; only: contracts, without any all.
    Raises PluginError for others.
    """
    if len(what) != 3:  # noqa: PLR2004 -- test, kind, name
        raise PluginError("expected blt plugins test KIND NAME [--set KEY=VALUE]…")
    _, kind, name = what
    check_kind(loaded, kind)
    try:
        from blt_core.testing.kit import profile_of, try_component
    except ModuleNotFoundError as error:
        text = f"the conformance kit needs {error.name}"
        raise PluginError(text, ("fix: pip install 'blt-core[testing]'",)) from error
    profile_of(profile)  # type: ignore[arg-type]  # any name is looked up
    table = parse_inline(" ".join([name, *keys]), kind)
    table.pop("use", None)
    results: list[Result] = []
    shown = console(120)
    tried = try_component(kind, name, table, plugins=loaded, profile=profile, only=only)  # type: ignore[arg-type]
    for result in tried:
        results.append(result)
        if not as_json:
            _show(shown, result)
    broken = [each for each in results if not each.passed]
    if as_json:
        output_json({"component": f"{kind}/{name}", "checks": [each.to_dict() for each in results]})
    else:
        skipped = sum(bool(each.skipped) for each in results)
        held = len(results) - len(broken) - skipped
        text = f"{held} contracts hold, {len(broken)} are broken, {skipped} do not apply"
        shown.print(f"{kind} {name!r}: {text}", highlight=False)
    if broken:
        raise typer.Exit(1)


def _show(shown: object, result: Result) -> None:
    """A line for a contract, and for a broken one what went against it."""
    from rich.console import Console
    from rich.text import Text

    if not isinstance(shown, Console):
        return
    word, style = ("ok", "green") if result.passed else ("BROKEN", "bold red")
    if result.skipped:
        word, style = "–", "dim"
    line = Text.assemble(
        (f"{word:7}", style), f"{result.contract:32}", (f"{result.seconds:6.1f} s", "dim")
    )
    if result.skipped:
        line.append(f"  {result.skipped}", "dim")
    if result.note:
        line.append(f"  note: {result.note}", "yellow")
    shown.print(line)
    if result.error is not None:
        shown.print(Text(f"        {result.error.text}"))
        if result.error.example is not None:
            shown.print(Text(f"        smallest example: {result.error.example!r}"))
        shown.print(Text(f"        page: {result.error.page}", "dim"))
