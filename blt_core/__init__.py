"""blt-core: byte-latent language models from plugins, wired by TOML, decoded exactly.

Start with :class:`Pipeline`. Plugin authors find the contracts in :mod:`blt_core.protocols`, the
values that they hand on in :mod:`blt_core.types`, the records in :mod:`blt_core.component` and the
hooks in :mod:`blt_core.hookspecs`; the names that they need most are here too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blt_core.caches import ListCache
    from blt_core.component import (
        Ability,
        BuildContext,
        Component,
        Kind,
        Preset,
        at_least,
        between,
        more_than,
        nested,
        nested_table,
        not_empty,
        one_of,
        overridable,
        trained,
    )
    from blt_core.decoding.engine import Request, Step
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
    from blt_core.plugins.loading import load_plugins
    from blt_core.protocols import (
        ByteScorer,
        Cache,
        CheckpointFormat,
        Corpus,
        CostModel,
        DecodeOps,
        Decoder,
        Drafter,
        Encoder,
        GlobalModel,
        Objective,
        Patcher,
        Sampler,
        TrainingBackend,
        Unmasking,
        Verification,
    )
    from blt_core.types import (
        Blocks,
        Cost,
        DecoderOutput,
        Draft,
        Draws,
        IdScheme,
        Latents,
        OpenBlock,
        Output,
        Parameters,
        Passes,
        Patches,
        Round,
        Rows,
        Sampling,
        Shape,
        Shapes,
    )
    from blt_core.wiring.config import Config, load_config

__version__ = "0.1.0"

__all__ = [
    "Ability",
    "Blocks",
    "BltError",
    "BuildContext",
    "ByteScorer",
    "Cache",
    "CheckpointError",
    "CheckpointFormat",
    "Component",
    "ComponentError",
    "Config",
    "ConfigError",
    "Corpus",
    "Cost",
    "CostModel",
    "DataError",
    "DecodeOps",
    "Decoder",
    "DecoderOutput",
    "Draft",
    "Drafter",
    "Draws",
    "Encoder",
    "EngineError",
    "Generation",
    "GlobalModel",
    "IdScheme",
    "Kind",
    "Latents",
    "ListCache",
    "Model",
    "Objective",
    "OpenBlock",
    "Output",
    "Parameters",
    "Passes",
    "Patcher",
    "Patches",
    "Pipeline",
    "PluginError",
    "Preset",
    "Request",
    "RequestError",
    "Round",
    "Rows",
    "RunError",
    "Sampler",
    "Sampling",
    "Shape",
    "Shapes",
    "Step",
    "TrainingBackend",
    "Unmasking",
    "Verification",
    "at_least",
    "between",
    "hookimpl",
    "load_config",
    "load_plugins",
    "more_than",
    "nested",
    "nested_table",
    "not_empty",
    "one_of",
    "overridable",
    "trained",
]

#: The modules of the names above. Each is imported when one of its names is first used: torch takes
#: seconds, which ``blt --help`` and programs that only read configs need not wait for.
_MODULES = {
    "component": (
        *("Ability", "BuildContext", "Component", "Kind", "Preset", "at_least", "between"),
        *("more_than", "nested", "nested_table", "not_empty", "one_of", "overridable"),
        *("trained",),
    ),
    "wiring.config": ("Config", "load_config"),
    "decoding.engine": ("Request", "Step"),
    "errors": (
        *("BltError", "CheckpointError", "ComponentError", "ConfigError", "DataError"),
        *("EngineError", "PluginError", "RequestError", "RunError"),
    ),
    "hookspecs": ("hookimpl",),
    "model": ("Model",),
    "pipeline": ("Generation", "Pipeline"),
    "plugins.loading": ("load_plugins",),
    "caches": ("ListCache",),
    "protocols": (
        *("ByteScorer", "Cache", "CheckpointFormat", "Corpus", "CostModel", "DecodeOps"),
        *("Decoder", "Drafter", "Encoder", "GlobalModel", "Objective", "Patcher", "Sampler"),
        *("TrainingBackend", "Unmasking", "Verification"),
    ),
    "types": (
        *("Blocks", "Cost", "DecoderOutput", "Draft", "Draws", "IdScheme", "Latents"),
        *("OpenBlock", "Output", "Parameters", "Passes", "Patches", "Round", "Rows", "Sampling"),
        *("Shape", "Shapes"),
    ),
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
