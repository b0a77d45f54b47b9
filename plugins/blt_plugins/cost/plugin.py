"""Hooks of the cost plugin."""

from blt_core.component import Component
from blt_core.hookspecs import hookimpl
from blt_plugins.cost.bandwidth import BANDWIDTH
from blt_plugins.cost.per_pass import PER_PASS
from blt_plugins.cost.roofline import ROOFLINE


@hookimpl
def blt_components() -> list[Component]:
    """The cost models."""
    return [BANDWIDTH, PER_PASS, ROOFLINE]
