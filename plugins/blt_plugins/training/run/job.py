"""What a run needs, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from blt_core.model import Model
from blt_core.plugins.loading import Plugins
from blt_core.protocols import CheckpointFormat, Corpus, Objective, TrainingBackend
from blt_plugins.training.scores.held_out import HeldOut
from blt_plugins.training.setup.settings import TrainSettings

#: The models of a run: the best one, and the last one where it is another.
BEST, LAST = "model", "model-last"


@attrs.frozen(eq=False, kw_only=True)
class Job:
    """All that a run needs, built.

    tables: the model's and its training's, which a resumed run must share. calibrates: whether
    the patcher's threshold is to be found. out: the folder where everything is written.
    objective_label: how messages name the objective, with its distribution.
    """

    model: Model
    corpus: Corpus
    objective: Objective
    backend: TrainingBackend
    format: CheckpointFormat
    settings: TrainSettings
    objective_label: str = "the objective"
    plugins: Plugins
    tables: Mapping[str, Any]
    calibrates: bool
    out: Path


@attrs.frozen
class TrainResult:
    """How a run ended.

    held_out: the score at the end, None if the run was found finished. model: the folder of the
    model with the best score. plot: of the losses, None where none is drawn.
    """

    threshold: float | None
    held_out: HeldOut | None
    best_bits_per_byte: float | None
    model: Path
    plot: Path | None = None
