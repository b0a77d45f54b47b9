"""Hooks of the global model's plugin."""

from blt_core.component import Component
from blt_core.hookspecs import hookimpl
from blt_plugins.latent.transformer import GLOBAL_TRANSFORMER


@hookimpl
def blt_components() -> list[Component]:
    """The global transformer."""
    return [GLOBAL_TRANSFORMER]
