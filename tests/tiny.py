"""A tiny model as a config, and as a checkpoint with weights that make it vary."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from blt_core.component import BuildContext
from blt_core.loading import build_model, plan_run, read_checkpoint
from blt_core.plugins.loading import load_plugins
from blt_core.storage.tensors import model_config, model_tensors
from blt_core.wiring.config import Config
from blt_core.wiring.resolve import build_node, resolve_component

CONFIG: dict[str, Any] = {
    "schema": 1,
    "model": {"context_bytes": 300},
    "patcher": {
        "use": "entropy",
        "threshold": 4.3,
        "max_patch_bytes": 6,
        "byte_scorer": {
            "use": "transformer",
            "dim": 16,
            "layers": 1,
            "heads": 2,
            "hidden": 24,
            "window": 16,
        },
    },
    "encoder": {
        "use": "local",
        "dim": 16,
        "heads": 2,
        "hidden": 24,
        "latent_dim": 24,
        "window": 16,
        "ngram_sizes": [3],
        "ngram_rows": 31,
    },
    "global_model": {"use": "transformer", "latent_dim": 24, "layers": 1, "heads": 2, "hidden": 32},
    "decoder": {
        "use": "local",
        "dim": 16,
        "layers": 2,
        "heads": 2,
        "hidden": 24,
        "latent_dim": 24,
        "window": 16,
    },
}


def config(**changes: Any) -> dict[str, Any]:
    """The tiny config with tables replaced (None drops one)."""
    tables = copy.deepcopy(CONFIG) | changes
    return {key: value for key, value in tables.items() if value is not None}


def write_checkpoint(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint folder of the tiny model, its weights scaled so that patches and bytes vary.

    changes: tables to replace.
    """
    plugins = load_plugins()
    plan, _ = plan_run(Config.from_mapping(config(run={"seed": seed}, **changes)), plugins)
    model = build_model(plan, None)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.module_dict().parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5, generator=generator)
    node = resolve_component("checkpoint_format", {"use": "folder"}, plugins)
    writer = build_node(node, BuildContext(), plugins.registry)
    writer.write(folder, model_config(model), model_tensors(model))
    read_checkpoint(str(folder), plugins)
    return folder
