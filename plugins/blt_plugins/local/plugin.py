"""Hooks of the local models' plugin."""

from blt_core.component import Component
from blt_core.hookspecs import hookimpl
from blt_plugins.local.decoder import LOCAL_DECODER
from blt_plugins.local.encoder import LOCAL_ENCODER


@hookimpl
def blt_components() -> list[Component]:
    """The local encoder and the local decoder."""
    return [LOCAL_ENCODER, LOCAL_DECODER]
