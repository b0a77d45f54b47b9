"""Hooks of the cost plugin."""

import typer

from blt_core.component import Component
from blt_core.hookspecs import hookimpl
from blt_plugins.cost.bandwidth import BANDWIDTH
from blt_plugins.cost.commands import add_commands


@hookimpl
def blt_components() -> list[Component]:
    """The cost models."""
    return [BANDWIDTH]


@hookimpl
def blt_commands(app: typer.Typer) -> None:
    """``blt cost``."""
    add_commands(app)
