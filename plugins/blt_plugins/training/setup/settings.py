"""``[train]``: how long, how fast, and on what share of the data a model is trained."""

from __future__ import annotations

from typing import Literal

import attrs

from blt_core.component import at_least, between, more_than, not_empty
from blt_core.files import expand_home
from blt_core.types import IdScheme
from blt_plugins.training.setup.schedule import Shape

#: What matrix products run in; parameters and optimizer are float32 either way.
Precision = Literal["float32", "bfloat16"]


@attrs.frozen(kw_only=True)
class ScorerSettings:
    """``[train.scorer]``: the byte scorer's own training, and the calibration after it.

    checkpoint: of a scorer that was trained alone, which is taken as it is, its threshold included.
    steps 0: the scorer stays as initialised. target_patch_bytes: the mean patch length that the
    threshold is calibrated to, on ``calibration_bytes`` of the training text.
    """

    checkpoint: str | None = attrs.field(
        default=None, validator=not_empty(), converter=attrs.converters.optional(expand_home)
    )
    steps: int = attrs.field(default=500, validator=at_least(0))
    batch_bytes: int = attrs.field(default=8192, validator=at_least(1))
    learning_rate: float = attrs.field(default=2e-3, validator=more_than(0))
    warmup_steps: int = attrs.field(default=50, validator=at_least(0))
    target_patch_bytes: float = attrs.field(default=4.0, validator=at_least(1))
    calibration_bytes: int = attrs.field(default=200_000, validator=at_least(1))


@attrs.frozen(kw_only=True)
class TrainSettings:
    """Keys of ``[train]``.

    steps: of the model; without any the scorer is trained alone. batch_bytes: bytes of one step,
    padding included; split over ``accumulate`` passes, which are dealt out to the processes.
    precision: see :class:`blt_plugins.training.objectives.losses.ModelLoss`.
    gradient_checkpointing: forget the inside of layers and compute it again, for less memory.
    context_bytes: length of the windows (default: the model's). weight_decay: of matrices only.
    score_after: only what follows this text in a window is trained and scored, as the answer to a
    prompt that ends so; windows without it are scored whole, and so is all text for the scorer.
    schedule, final_rate, decay_share: the learning rate's shape, where it ends as a share of
    learning_rate, and how long a wsd schedule decays, as a share of the steps (see
    :class:`blt_plugins.training.setup.schedule.Schedule`); the scorer's rate has the same shape.
    validate_every, checkpoint_every, log_every: in steps. keep_states: how many states are kept.
    async_states: whether states are copied and written while training goes on.
    valid_bytes: held-out text that is scored (0: none). valid_drafts: held-out prefixes after which
    drafts of a denoising decoder are judged (0: none). shuffle_bytes: of the text that is in memory
    and shuffled at a time. tensorboard: whether to write its events. plot: whether to draw the
    losses at the end.
    save_dtype: of the models written; the training state is always kept as it is.
    """

    steps: int = attrs.field(default=0, validator=at_least(0))
    batch_bytes: int = attrs.field(default=8192, validator=at_least(1))
    context_bytes: int | None = attrs.field(default=None, validator=at_least(1))
    accumulate: int = attrs.field(default=1, validator=at_least(1))
    learning_rate: float = attrs.field(default=1.5e-3, validator=more_than(0))
    schedule: Shape = "cosine"
    final_rate: float = attrs.field(default=0.1, validator=between(0, 1))
    decay_share: float = attrs.field(default=0.2, validator=between(0, 1))
    warmup_steps: int = attrs.field(default=100, validator=at_least(0))
    weight_decay: float = attrs.field(default=0.1, validator=at_least(0))
    score_after: str | None = attrs.field(default=None, validator=not_empty())
    clip: float = attrs.field(default=1.0, validator=more_than(0))
    precision: Precision = "float32"
    gradient_checkpointing: bool = False
    seed: int = 0
    shuffle_bytes: int = attrs.field(default=256_000_000, validator=at_least(1))
    validate_every: int = attrs.field(default=200, validator=at_least(1))
    valid_bytes: int = attrs.field(default=60_000, validator=at_least(0))
    checkpoint_every: int = attrs.field(default=100, validator=at_least(1))
    keep_states: int = attrs.field(default=3, validator=at_least(1))
    async_states: bool = False
    log_every: int = attrs.field(default=1, validator=at_least(1))
    valid_drafts: int = attrs.field(default=32, validator=at_least(0))
    tensorboard: bool = True
    plot: bool = True
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    out: str | None = attrs.field(default=None, converter=attrs.converters.optional(expand_home))
    scorer: ScorerSettings = attrs.field(factory=ScorerSettings)

    def marker(self, scheme: IdScheme) -> list[int]:
        """The ids of ``score_after``; none where all text is scored."""
        return scheme.encode((self.score_after or "").encode())
