"""The linear map of the torch parts: no bias, and single rows at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_HALF = (torch.bfloat16, torch.float16)


class Linear(nn.Linear):
    """x · weightᵀ, (…, in) to (…, out).

    Decoding one byte multiplies one row, which takes as long as reading the weight. On a CPU, in
    half precision, the matrix-vector product reads wide weights up to 1.5 times as fast as the
    product that ``functional.linear`` picks.

    Several ``dims_out`` are maps of the same input whose matrices are stacked in this order, to be
    one product. ``stacked`` keeps their rows, for an optimizer that treats each as a matrix.
    """

    def __init__(self, dim_in: int, *dims_out: int) -> None:
        super().__init__(dim_in, sum(dims_out), bias=False)
        self.stacked = dims_out

    def forward(self, x: Tensor) -> Tensor:
        """As ``functional.linear``."""
        return product(x, self.weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """The product x · weightᵀ, (…, in) to (…, out); see :class:`Linear`."""
    if torch.compiler.is_compiling():
        return _product_traced(x, weight)
    if weight.dtype in _HALF and x.numel() == weight.shape[1] and weight.is_cpu:
        return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    return functional.linear(x, weight)


def _product_traced(x: Tensor, weight: Tensor) -> Tensor:
    """``product`` as a compiler does best: on a CPU one row by a loop of its own.

    Which reads each weight once, in order, widens it where it is narrow, and is joined with what is
    around it; libraries read a matrix for one row at half of that speed or less.
    """
    if not (x.is_cpu and all(size == 1 for size in x.shape[:-1])):
        return functional.linear(x, weight)
    exact = torch.promote_types(x.dtype, torch.float32)
    summed = (weight.to(exact) * x.reshape(-1).to(exact)).sum(-1)
    return summed.to(x.dtype).view(*x.shape[:-1], -1)


def product_dtype(x: Tensor) -> torch.dtype:
    """What a ``Linear`` of rows ``x`` gives: the dtype of autocast, where that is on.

    Autocast leaves float64 alone.
    """
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)
