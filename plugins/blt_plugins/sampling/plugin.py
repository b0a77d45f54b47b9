"""Hooks of the samplers' plugin."""

from blt_core.component import Component, Preset
from blt_core.hookspecs import hookimpl
from blt_plugins.sampling.autoregressive import AUTOREGRESSIVE
from blt_plugins.sampling.speculative import BLT_S, SPECULATIVE


@hookimpl
def blt_components() -> list[Component | Preset]:
    """The samplers and their presets."""
    return [AUTOREGRESSIVE, SPECULATIVE, BLT_S]
