"""Hooks of the cost plugin."""

from blt_core.component import Component
from blt_core.hookspecs import hookimpl
from blt_plugins.cost.bandwidth import BANDWIDTH
from blt_plugins.cost.roofline import ROOFLINE


@hookimpl
def blt_components() -> list[Component]:
    """The cost models."""
    return [BANDWIDTH, ROOFLINE]
