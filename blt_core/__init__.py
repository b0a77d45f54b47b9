"""blt-core: byte-latent language models from plugins, wired by TOML, decoded exactly.

Start with :class:`Pipeline`. Plugin authors find the contracts in :mod:`blt_core.protocols`, the
records in :mod:`blt_core.component` and the hooks in :mod:`blt_core.hookspecs`.
"""

from blt_core.component import (
    BuildContext,
    Component,
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
