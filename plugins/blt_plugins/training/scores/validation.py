"""What a run is scored by on held-out text, between its steps and at its end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import attrs

from blt_core.model import Model
from blt_core.pipeline import Pipeline
from blt_core.plugins.loading import Plugins
from blt_core.storage.tensors import model_config
from blt_core.wiring.config import Config
from blt_core.wiring.resolve import resolve
from blt_plugins.training.data.windows import Batch
from blt_plugins.training.scores.acceptance import acceptance, batched
from blt_plugins.training.scores.accuracy import masked_accuracy
from blt_plugins.training.scores.held_out import HeldOut, evaluate_model

#: Masking rates whose accuracy is told.
RATES = (0.25, 0.5, 0.75, 1.0)
SELF_DRAFTS = "blt-s draft_bytes=16"

T = TypeVar("T")


class Between(Protocol):
    """Looks up between batches; it may raise to end the work there."""

    def __call__(self, items: Iterable[T], /) -> Iterable[T]:
        """The items themselves."""
        ...


@attrs.frozen
class Scores:
    """Scores of a model.

    masked_accuracy: share of masked bytes that one pass fills in rightly, by the masking rate.
    accepted: share of drafted bytes that stand, by sampler. Both are empty for a decoder that does
    not denoise.
    """

    held_out: HeldOut
    masked_accuracy: dict[str, float]
    accepted: dict[str, float]

    def describe(self) -> str:
        """The figures on one line."""
        held_out = self.held_out
        parts = [
            f"{held_out.bits_per_byte:.4f} held-out bits per byte",
            f"patches of {held_out.mean_patch_bytes:.2f} bytes",
        ]
        parts += [f"{share:.1%} right at t={t}" for t, share in self.masked_accuracy.items()]
        parts += [f"{share:.1%} accepted of {name}" for name, share in self.accepted.items()]
        return ", ".join(parts)

    def record(self) -> dict[str, Any]:
        """Figures to log."""
        return {
            "bits_per_byte": self.held_out.bits_per_byte,
            "mean_patch_bytes": self.held_out.mean_patch_bytes,
            **{f"masked_accuracy/{rate}": share for rate, share in self.masked_accuracy.items()},
            **{f"accepted/{sampler}": share for sampler, share in self.accepted.items()},
        }


def validate(
    model: Model,
    batches: Sequence[Batch],
    prefixes: Sequence[bytes],
    plugins: Plugins,
    *,
    block_bytes: int,
    between: Between = iter,
) -> Scores:
    """Score ``model`` on held-out windows, and its drafts after held-out prefixes.

    between: what the batches of each score are read through.
    """
    held_out = evaluate_model(model, between(batches))
    denoises = bool(getattr(model.decoder, "denoises", False))
    if not math.isfinite(held_out.bits_per_byte):
        denoises = False  # nothing can be drafted from logits that are no numbers
    samplers = (SELF_DRAFTS, f"blt-dv block_bytes={block_bytes} start=aligned")
    pipeline = _pipeline(model, plugins) if prefixes else None
    accepted = {}
    for sampler in samplers if denoises and pipeline else ():
        found = acceptance(pipeline, sampler, between(batched(prefixes))).accepted_share
        if found is not None:
            accepted[sampler] = found
    return Scores(
        held_out,
        masked_accuracy(model, between(batches), block_bytes, RATES) if denoises else {},
        accepted,
    )


def _pipeline(model: Model, plugins: Plugins) -> Pipeline:
    tables = {
        **model_config(model),
        "sampler": {"use": "ar"},
        "cost_model": {"use": "bandwidth"},
    }
    return Pipeline(resolve(Config.from_mapping(tables), plugins), plugins, model)
