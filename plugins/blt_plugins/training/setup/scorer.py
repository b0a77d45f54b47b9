"""The byte scorer of a patcher, as training sees it."""

from __future__ import annotations

import attrs
import torch
from torch import nn

from blt_core.model import Model
from blt_core.protocols import ByteScorer, ThresholdPatcher


@attrs.frozen(eq=False)
class TrainableScorer:
    """One byte scorer, as what it does and as what holds its parameters."""

    part: ByteScorer
    module: nn.Module


def trainable_scorer(model: Model) -> TrainableScorer | None:
    """The byte scorer of a patcher that has one with parameters."""
    if not isinstance(model.patcher, ThresholdPatcher):
        return None
    part: ByteScorer = model.patcher.byte_scorer
    module: object = part
    return TrainableScorer(part, module) if isinstance(module, nn.Module) else None


@torch.no_grad()
def round_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter a value that ``dtype`` can hold; its own dtype stays."""
    for parameter in module.parameters():
        parameter.copy_(parameter.to(dtype))
