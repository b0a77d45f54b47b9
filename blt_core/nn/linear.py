"""The linear map of the torch parts: no bias, and single rows at the speed of memory."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

_HALF = (torch.bfloat16, torch.float16)

#: A product x · weightᵀ of a weight that it knows.
Multiply = Callable[[Tensor], Tensor]
#: An operator of torch that gives the product of rows and a weight.
Operator = Callable[[Tensor, Tensor], Tensor]


class Linear(nn.Linear):
    """x · weightᵀ, (…, in) to (…, out).

    Decoding one byte multiplies one row, which takes as long as reading the weight, and which
    kernel does that best depends on the machine: see :class:`Kernels`.

    Several ``dims_out`` are maps of the same input whose matrices are stacked in this order, to be
    one product. ``stacked`` keeps their rows, for an optimizer that treats each as a matrix.
    """

    def __init__(self, dim_in: int, *dims_out: int) -> None:
        super().__init__(dim_in, sum(dims_out), bias=False)
        self.stacked = dims_out

    def forward(self, x: Tensor) -> Tensor:
        """As ``functional.linear``."""
        return product(x, self.weight)


@attrs.frozen(eq=False)
class Kernels:
    """What multiplies rows by one weight, by how many rows there are: its attribute ``kernels``.

    They are of the weight as it was when they were made, at address ``at`` and of ``dtype``; one
    that has moved since, or rows of another dtype, are multiplied by the fixed rule.

    compiled_one, compiled_several: operators that compiled programs call for one row, and for
    more, in place of products of their own, with rows and weight (None: they call none).
    """

    at: int
    dtype: torch.dtype
    one: Multiply
    few: Multiply
    some: Multiply
    many: Multiply
    compiled_one: Operator | None = None
    compiled_several: Operator | None = None

    @property
    def compiled(self) -> str:
        """The operators for compiled programs, in words."""
        return f"{self.compiled_one} {self.compiled_several}"

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        if x.dtype is not self.dtype or weight.data_ptr() != self.at:
            return fixed_product(x, weight)
        rows = x.numel() // x.shape[-1]
        if rows == 1:
            return self.one(x)
        if rows <= FEW:
            return self.few(x)
        return self.some(x) if rows <= SOME else self.many(x)


def kernels_of(weight: Tensor) -> Kernels | None:
    """The kernels that a weight was given, if any."""
    found: Kernels | None = getattr(weight, "kernels", None)
    return found


#: Most rows of the second class that a kernel is chosen for; the first is one row.
FEW = 4
#: Most rows of the third class; the last is all that are more.
SOME = 16


def product(x: Tensor, weight: Tensor) -> Tensor:
    """The product x · weightᵀ, (…, in) to (…, out).

    By the weight's ``kernels``, if it has any, where no gradient is asked for; under autocast by
    the fixed rule; in what is compiled by their operator, or else as a compiler does best.
    """
    kernels = kernels_of(weight)
    if torch.compiler.is_compiling():
        return _product_traced(x, weight, kernels)
    if kernels is None or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return fixed_product(x, weight)
    return kernels(x, weight)


def fixed_product(x: Tensor, weight: Tensor) -> Tensor:
    """The product by the fixed rule: see :func:`fixed_rule`."""
    if weight.dtype in _HALF and x.numel() == weight.shape[1] and weight.is_cpu:
        return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    return functional.linear(x, weight)


def fixed_rule(dtype: torch.dtype, rows: int) -> str:
    """The kernel of ``rows`` where none is chosen, on a CPU: ``mv`` for one row in half precision.

    On a CPU without arithmetic of half precision it reads wide weights up to 1.5 times as fast as
    what ``functional.linear`` picks, which is taken otherwise.
    """
    return "mv" if dtype in _HALF and rows == 1 else "linear"


def _product_traced(x: Tensor, weight: Tensor, kernels: Kernels | None) -> Tensor:
    """``product`` by the operator of the kernels, or as a compiler does best.

    That is, on a CPU, one row by a loop of its own, which reads each weight once, in order, widens
    it where it is narrow, and is joined with what is around it; libraries read a matrix for one row
    at half of that speed or less.
    """
    one = all(size == 1 for size in x.shape[:-1])
    fits = x.is_cpu and weight.is_contiguous() and not torch.is_grad_enabled()
    if kernels is not None and x.dtype is kernels.dtype and fits:
        operator = kernels.compiled_one if one else kernels.compiled_several
        if operator is not None:
            return operator(x, weight)
    if not (x.is_cpu and one):
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
