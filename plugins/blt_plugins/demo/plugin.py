"""Hooks of the demo plugin."""

from blt_core.component import Component
from blt_core.hookspecs import hookimpl
from blt_plugins.demo.format import DEMO


@hookimpl
def blt_components() -> list[Component]:
    """The format of the checkpoints that ship with the package."""
    return [DEMO]
