"""The kernels to choose from: each multiplies rows x (…, k) by a weight (n, k), to (…, n).

All sum in float32 at least, but for what torch's own do in half precision; tests hold each to the
product in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from blt_core.kernels import native
from blt_core.nn.linear import FEW, Kernels, Multiply, fixed_product, fixed_rule

#: Classes of rows, each with the rows that it is measured with.
ROW_CLASSES: Mapping[str, int] = {"1": 1, "2-4": FEW, "5-16": 9, "more": 32}


@attrs.frozen
class Kernel:
    """A candidate.

    fits: whether it serves a weight and so many rows. prepare: the product with a weight; it may
    make a copy of it, of another layout (``copies``).
    """

    name: str
    fits: Callable[[Tensor, int], bool]
    prepare: Callable[[Tensor], Multiply]
    copies: bool = False


def chosen_from(weight: Tensor, rows: int) -> list[Kernel]:
    """The kernels that serve a weight and so many rows; that of the fixed rule comes first."""
    first = fixed_rule(weight.dtype, rows)
    able = [each for each in KERNELS.values() if each.fits(weight, rows)]
    return sorted(able, key=lambda each: each.name != first)


def is_chosen_for(weight: Tensor) -> bool:
    """Whether there is anything to choose: on a CPU, in bfloat16 or float32."""
    return (
        weight.is_cpu
        and weight.dtype in (torch.bfloat16, torch.float32)
        and weight.is_contiguous()
        and weight.numel() > 0
    )


def prepare(weight: Tensor, names: Mapping[str, str]) -> Kernels:
    """The kernels of a weight, by the names for each class of rows; a copy is made once.

    The fixed rule serves classes without a name, and those that a kernel does not serve.
    """
    made: dict[str, Multiply] = {}

    def multiply(rows_class: str, rows: int) -> Multiply:
        name = names.get(rows_class, "")
        if name not in KERNELS or not KERNELS[name].fits(weight, rows):
            name = fixed_rule(weight.dtype, rows)
        if name not in made:
            made[name] = KERNELS[name].prepare(weight)
        return made[name]

    one, few, some, many = (multiply(*item) for item in ROW_CLASSES.items())
    operator = native.load() if "native" in made else None
    compiled_one, compiled_several = (
        operator if names.get(rows_class) == "native" else None for rows_class in ("1", "5-16")
    )
    at, dtype = weight.data_ptr(), weight.dtype
    return Kernels(at, dtype, one, few, some, many, compiled_one, compiled_several)


def _linear(weight: Tensor) -> Multiply:
    weight = weight.detach()
    return lambda x: functional.linear(x, weight)


def _mv(weight: Tensor) -> Multiply:
    weight = weight.detach()
    return lambda x: torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)


def _columns(weight: Tensor) -> Multiply:
    copied = weight.detach().t().contiguous().t()
    return _unless_changed(weight, lambda x: functional.linear(x, copied))


def _packed(weight: Tensor) -> Multiply:
    packed, n = _pack(weight), weight.shape[0]
    run = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 -- what torch.compile itself calls

    def multiply(x: Tensor) -> Tensor:
        out: Tensor = run(x.reshape(-1, x.shape[-1]), packed, None, "none", [], "")
        return out.view(*x.shape[:-1], n)

    return _unless_changed(weight, multiply)


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), FEW)  # noqa: SLF001
    return packed


def packs(weight: Tensor) -> bool:
    """Whether oneDNN packs weights of this dtype on this CPU."""
    try:
        _pack(weight[:1])
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return True


def _unless_changed(weight: Tensor, multiply: Multiply) -> Multiply:
    """A product with a copy of a weight, until that is written to."""
    seen = weight.detach()  # shares the count of what was written
    version = seen._version  # noqa: SLF001
    return lambda x: multiply(x) if seen._version == version else fixed_product(x, seen)  # noqa: SLF001


def _native(weight: Tensor) -> Multiply:
    run = native.load()
    weight = weight.detach()
    return _linear(weight) if run is None else lambda x: run(x, weight)


def _copied(weight: Tensor, _rows: int) -> bool:
    """Whether a copy can be told to be out of date; half precision is slow by columns."""
    return weight.dtype == torch.float32 and not weight.is_inference()


KERNELS: Mapping[str, Kernel] = {
    each.name: each
    for each in (
        Kernel("linear", lambda _weight, _rows: True, _linear),
        Kernel("mv", lambda _weight, rows: rows == 1, _mv),
        Kernel("native", lambda _weight, _rows: native.load() is not None, _native),
        Kernel(
            "onednn",
            lambda weight, _rows: not weight.is_inference() and packs(weight),
            _packed,
            copies=True,
        ),
        Kernel("columns", _copied, _columns, copies=True),
    )
}
