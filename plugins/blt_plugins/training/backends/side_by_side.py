"""Passes of a step side by side, each in a thread of its own.

Operations of one pass are too short to keep several cores busy, and passes of a step do not depend
on each other. A pass computes the same as it would alone, and gradients are added in the order of
the passes: so the sums are those of passes one after another, to the last bit, if each has as many
threads then.
"""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

#: Gradients of some parameters, None for those that a loss does not depend on.
Gradients = Sequence[Tensor | None]


class SideBySide:
    """``count`` passes at a time; they share the threads that torch has where this is made."""

    def __init__(self, count: int) -> None:
        self._count = count
        share = max(torch.get_num_threads() // count, 1)
        # torch's thread count is per thread, so this does not affect other threads.
        self._pool = ThreadPoolExecutor(count, "pass", torch.set_num_threads, (share,))

    def add(
        self,
        losses: Iterable[Callable[[], Tensor]],
        parameters: Sequence[nn.Parameter],
        *,
        accumulate: int,
    ) -> None:
        """Add the gradient of each loss / ``accumulate`` to those that the parameters hold.

        The iterable is read in this thread, one pass farther than those that run.
        """
        running: deque[Future[Gradients]] = deque()
        for loss in losses:
            if len(running) == self._count:
                _add(running.popleft().result(), parameters)
            context = contextvars.copy_context()
            running.append(self._pool.submit(context.run, _gradients, loss, parameters, accumulate))
        while running:
            _add(running.popleft().result(), parameters)

    def close(self) -> None:
        """Wait for the passes that are running, and let the threads go."""
        self._pool.shutdown()


def _gradients(
    loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], accumulate: int
) -> Gradients:
    return torch.autograd.grad(loss() / accumulate, parameters, allow_unused=True)


@torch.no_grad()
def _add(gradients: Gradients, parameters: Sequence[nn.Parameter]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:  # memory of its own: autograd may give one tensor twice
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        else:
            parameter.grad += gradient
