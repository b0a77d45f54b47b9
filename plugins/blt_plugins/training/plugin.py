"""Hooks of the training plugin."""

from __future__ import annotations

from typing import Any

from blt_core.component import Component
from blt_core.hookspecs import hookimpl
from blt_core.plugins.loading import Plugins
from blt_core.wiring.config import Config
from blt_plugins.training.backends.torch import TORCH_BACKEND
from blt_plugins.training.corpora.folder import FOLDER_CORPUS
from blt_plugins.training.corpora.jsonl import JSONL_CORPUS
from blt_plugins.training.corpora.mixture import MIXTURE_CORPUS
from blt_plugins.training.corpora.parquet import PARQUET_CORPUS
from blt_plugins.training.corpora.prepared import PREPARED_CORPUS
from blt_plugins.training.objectives.block_diffusion import BLOCK_DIFFUSION_OBJECTIVE
from blt_plugins.training.objectives.next_byte import NEXT_BYTE
from blt_plugins.training.setup.config import plan_training
from blt_plugins.training.setup.settings import TrainSettings


@hookimpl
def blt_components() -> list[Component]:
    """The corpora, the objectives and the torch backend."""
    corpora = [FOLDER_CORPUS, JSONL_CORPUS, PARQUET_CORPUS, MIXTURE_CORPUS, PREPARED_CORPUS]
    return [*corpora, NEXT_BYTE, BLOCK_DIFFUSION_OBJECTIVE, TORCH_BACKEND]


@hookimpl
def blt_settings() -> dict[str, type]:
    """The table [train]."""
    return {"train": TrainSettings}


@hookimpl
def blt_check(config: Config, plugins: Plugins) -> dict[str, Any] | None:
    """Training configs: those with the table [train]."""
    return plan_training(config, plugins).describe() if "train" in config.tables else None
