"""Hooks of the DeepSpeed plugin."""

from blt_core.component import Component
from blt_core.hookspecs import hookimpl
from blt_plugins.deepspeed.backend import DEEPSPEED_BACKEND


@hookimpl
def blt_components() -> list[Component]:
    """The DeepSpeed backend."""
    return [DEEPSPEED_BACKEND]
