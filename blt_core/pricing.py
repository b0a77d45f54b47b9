"""What passes cost, as a cost model says, held to what cost models promise."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

from blt_core.faults import broken, naming
from blt_core.types import Cost, Parameters, Passes

if TYPE_CHECKING:
    from blt_core.protocols import CostModel


def price(model: CostModel, passes: Passes, parameters: Parameters) -> Cost:
    """What ``model`` asks for passes of a model of these sizes.

    Raises ComponentError, which names the cost model, for what is no finite Cost.
    """
    with naming():
        cost = model.cost(passes, parameters)
    if not isinstance(cost, Cost):
        raise broken(model, f"gave {cost!r}; expected a Cost", "cost_model.finite")
    figures: dict[str, Any] = {"total": cost.total, **cost.lines, **cost.apart}
    for name, figure in figures.items():
        if not isinstance(figure, Real) or not 0 <= float(figure) < math.inf:
            text = f"gave {name} = {figure!r}; expected a finite number, 0 or more"
            raise broken(model, text, "cost_model.finite")
    if not isinstance(cost.unit, str) or not cost.unit:
        text = f"gave unit = {cost.unit!r}; expected a text such as 'GB'"
        raise broken(model, text, "cost_model.unit")
    return cost
