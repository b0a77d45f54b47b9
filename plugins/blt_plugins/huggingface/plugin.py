"""Hooks of the plugin for transformers' checkpoints."""

from blt_core.component import Component
from blt_core.hookspecs import hookimpl
from blt_plugins.huggingface.format import HUGGINGFACE


@hookimpl
def blt_components() -> list[Component]:
    """The checkpoint format."""
    return [HUGGINGFACE]
