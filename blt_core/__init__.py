"""blt-core: byte-latent language models from plugins, wired by TOML, decoded exactly.

Start with :class:`Pipeline`. Plugin authors find the contracts in :mod:`blt_core.protocols`, the
records in :mod:`blt_core.component` and the hooks in :mod:`blt_core.hookspecs`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blt_core.component import (
        BuildContext,
        Component,
        Kind,
        Preset,
        nested,
        nested_table,
        overridable,
        trained,
    )
    from blt_core.errors import (
        BltError,
        CheckpointError,
        ComponentError,
        ConfigError,
        DataError,
        EngineError,
        PluginError,
        RequestError,
        RunError,
    )
    from blt_core.hookspecs import hookimpl
    from blt_core.model import Model
    from blt_core.pipeline import Generation, Pipeline
    from blt_core.types import Cost, IdScheme, Parameters, Passes, Sampling

__version__ = "0.1.0"

__all__ = [
    "BltError",
    "BuildContext",
    "CheckpointError",
    "Component",
    "ComponentError",
    "ConfigError",
    "Cost",
    "DataError",
    "EngineError",
    "Generation",
    "IdScheme",
    "Kind",
    "Model",
    "Parameters",
    "Passes",
    "Pipeline",
    "PluginError",
    "Preset",
    "RequestError",
    "RunError",
    "Sampling",
    "hookimpl",
    "nested",
    "nested_table",
    "overridable",
    "trained",
]

#: The modules of the names above. Each is imported when one of its names is first used: torch takes
#: seconds, which ``blt --help`` and programs that only read configs need not wait for.
_MODULES = {
    "component": (
        *("BuildContext", "Component", "Kind", "Preset"),
        *("nested", "nested_table", "overridable", "trained"),
    ),
    "errors": (
        *("BltError", "CheckpointError", "ComponentError", "ConfigError", "DataError"),
        *("EngineError", "PluginError", "RequestError", "RunError"),
    ),
    "hookspecs": ("hookimpl",),
    "model": ("Model",),
    "pipeline": ("Generation", "Pipeline"),
    "types": ("Cost", "IdScheme", "Parameters", "Passes", "Sampling"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
