"""Hooks of the DeepSpeed plugin."""

from blt_core.component import Component
from blt_core.hookspecs import hookimpl


@hookimpl
def blt_components() -> list[Component]:
    """The DeepSpeed backend."""
    return []
