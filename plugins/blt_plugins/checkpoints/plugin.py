"""Hooks of the checkpoints' plugin."""

from blt_core.component import Component
from blt_core.hookspecs import hookimpl
from blt_plugins.checkpoints.folder import FOLDER


@hookimpl
def blt_components() -> list[Component]:
    """The checkpoint formats."""
    return [FOLDER]
