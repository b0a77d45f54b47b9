"""What a run is scored by on held-out text, between its steps and at its end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import attrs

from blt_core.model import Model
from blt_core.pipeline import Pipeline
from blt_core.plugins.loading import Plugins
from blt_core.storage.tensors import model_config
from blt_core.wiring.config import Config
from blt_core.wiring.resolve import resolve
from blt_plugins.training.data.shares import Share
from blt_plugins.training.data.windows import Batch
from blt_plugins.training.scores.acceptance import acceptance
from blt_plugins.training.scores.accuracy import masked_accuracy
from blt_plugins.training.scores.held_out import HeldOut, evaluate_model

#: Masking rates whose accuracy is told.
RATES = (0.25, 0.5, 0.75, 1.0)
SELF_DRAFTS = "blt-s draft_bytes=16"

T = TypeVar("T")


class Processes(Protocol):
    """How the processes of a run score together; each calls the same methods in the same order."""

    def each(self, share: Share[T], /) -> Iterator[T]:
        """This process's batches; it may raise before one of them to end the work in all."""
        ...

    def total(self, values: Sequence[float], /) -> list[float]:
        """The sum of each value over the processes."""
        ...


class OneProcess:
    """A process that scores all by itself."""

    def each(self, share: Share[T], /) -> Iterator[T]:
        """Its batches."""
        return iter(share)

    def total(self, values: Sequence[float], /) -> list[float]:
        """Its values."""
        return list(values)


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
    batches: Share[Batch],
    prefixes: Share[list[bytes]],
    plugins: Plugins,
    *,
    block_bytes: int,
    longest_prefix: int | None = None,
    processes: Processes | None = None,
) -> Scores:
    """Score ``model`` on held-out windows, and its drafts after held-out prefixes.

    Each process scores its share; the scores are those of all of it, the same in every process.
    longest_prefix: in bytes, of all processes; None for that of each group.
    """
    each, total = (processes or OneProcess()).each, (processes or OneProcess()).total
    held_out = evaluate_model(model, each(batches), total)
    denoises = bool(getattr(model.decoder, "denoises", False))
    if not math.isfinite(held_out.bits_per_byte):
        denoises = False  # nothing can be drafted from logits that are no numbers
    samplers = (SELF_DRAFTS, f"blt-dv block_bytes={block_bytes} start=aligned")
    pipeline = _pipeline(model, plugins) if prefixes.rounds else None
    accepted = {}
    for sampler in samplers if denoises and pipeline else ():
        found = acceptance(pipeline, sampler, each(prefixes), longest=longest_prefix)
        stood, drafted = map(round, total([found.accepted, found.drafted]))
        if drafted:
            accepted[sampler] = stood / drafted
    return Scores(
        held_out,
        masked_accuracy(model, each(batches), block_bytes, RATES, total) if denoises else {},
        accepted,
    )


def _pipeline(model: Model, plugins: Plugins) -> Pipeline:
    tables = {
        **model_config(model),
        "sampler": {"use": "ar"},
        "cost_model": {"use": "bandwidth"},
    }
    return Pipeline(resolve(Config.from_mapping(tables), plugins), plugins, model)
