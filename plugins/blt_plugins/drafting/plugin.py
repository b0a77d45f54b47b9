"""Hooks of the drafters' plugin."""

from blt_core.component import Component
from blt_core.hookspecs import hookimpl
from blt_plugins.drafting.cascade import CASCADE
from blt_plugins.drafting.diffusion import DIFFUSION
from blt_plugins.drafting.self import SELF


@hookimpl
def blt_components() -> list[Component]:
    """The drafters."""
    return [SELF, DIFFUSION, CASCADE]
