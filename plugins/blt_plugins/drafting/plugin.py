"""Hooks of the drafters' plugin."""

from blt_core.component import Component
from blt_core.hookspecs import hookimpl
from blt_plugins.drafting.adaptive import ADAPTIVE
from blt_plugins.drafting.cascade import CASCADE
from blt_plugins.drafting.diffusion import DIFFUSION
from blt_plugins.drafting.first import FIRST
from blt_plugins.drafting.lookup import LOOKUP
from blt_plugins.drafting.model import MODEL
from blt_plugins.drafting.self import SELF
from blt_plugins.drafting.until import UNTIL


@hookimpl
def blt_components() -> list[Component]:
    """The drafters."""
    return [SELF, MODEL, DIFFUSION, CASCADE, LOOKUP, FIRST, UNTIL, ADAPTIVE]
