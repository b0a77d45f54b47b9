"""Gradient checkpointing: layers are computed again in the backward pass, not remembered.

A part wraps the calls of its layers in :func:`recompute`; whoever trains it decides, by
:func:`gradient_checkpointing`, whether that does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

R = TypeVar("R")

_ACTIVE: ContextVar[bool] = ContextVar("gradient_checkpointing", default=False)


@contextmanager
def gradient_checkpointing(*, active: bool = True) -> Iterator[None]:
    """Forward passes within keep the inputs of their layers alone."""
    token = _ACTIVE.set(active)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def recompute(layer: Callable[..., R], *args: object) -> R:
    """``layer(...)``, whose inner results are forgotten if gradients are checkpointed."""
    if not (_ACTIVE.get() and torch.is_grad_enabled()):
        return layer(*args)
    result: R = checkpoint(layer, *args, use_reentrant=False)
    return result
