"""Hooks of the patching plugin."""

from blt_core.component import Component
from blt_core.hookspecs import hookimpl
from blt_plugins.patching.entropy import ENTROPY
from blt_plugins.patching.scorer import TRANSFORMER_SCORER
from blt_plugins.patching.space import SPACE
from blt_plugins.patching.static import STATIC


@hookimpl
def blt_components() -> list[Component]:
    """Patchers, and the byte scorer of the entropy patcher."""
    return [ENTROPY, STATIC, SPACE, TRANSFORMER_SCORER]
