"""``blt docs``: the manual in a terminal."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from blt_core.cli.streams import console, output
from blt_core.plugins.loading import load_plugins


def docs(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="[KIND]", help="The page of this kind, or KIND.CONTRACT."),
    ] = None,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The page of this component: its keys.")
    ] = None,
    *,
    source: Annotated[
        bool, typer.Option("--source", help="Print the Markdown itself, on a terminal too.")
    ] = False,
) -> None:
    """Read the manual: the list of components, a kind, or a component of it.

    What is no terminal gets the Markdown itself.
    """
    from blt_core.cli.manual import component_text, contract_text, kind_text, list_text

    loaded = load_plugins()
    if kind is None:
        text = list_text(loaded)
    elif name is None and (parts := re.fullmatch(r"(\w+)[.#](\S+)", kind)):
        text = contract_text(loaded, *parts.groups())
    elif name is None:
        text = kind_text(loaded, kind)
    else:
        text = component_text(loaded, kind, name)
    shown = console(100)
    if source or not shown.is_terminal:
        output(text.rstrip("\n"))
        return
    from rich.markdown import Markdown

    shown.print(Markdown(text))
