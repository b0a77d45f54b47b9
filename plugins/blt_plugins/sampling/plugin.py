"""Hooks of the samplers' plugin."""

from blt_core.component import Component, Preset
from blt_core.hookspecs import hookimpl
from blt_plugins.sampling.autoregressive import AUTOREGRESSIVE
from blt_plugins.sampling.diffusion import BLOCK_DIFFUSION
from blt_plugins.sampling.presets import BLT_AUTO, BLT_CASCADE, BLT_DV, BLT_LOOKUP, BLT_S
from blt_plugins.sampling.speculative import SPECULATIVE


@hookimpl
def blt_components() -> list[Component | Preset]:
    """The samplers and their presets."""
    presets = [BLT_S, BLT_DV, BLT_LOOKUP, BLT_CASCADE, BLT_AUTO]
    return [AUTOREGRESSIVE, SPECULATIVE, BLOCK_DIFFUSION, *presets]
