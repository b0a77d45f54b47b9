"""What cost models promise."""

from __future__ import annotations

import json
import math
from numbers import Real
from typing import Any

import attrs
from hypothesis import strategies as st

from blt_core.testing.contracts import Broken, Contracts, require
from blt_core.testing.subject import Subject
from blt_core.types import Cost, Parameters, Passes, Shape, Shapes

COST_MODEL = Contracts("cost_model")
#: Letters of a unit: it stands above a column.
LONGEST_UNIT = 12

_counts = st.integers(0, 5000)
_widths = st.dictionaries(st.integers(1, 5000), st.integers(1, 1000), max_size=4)
_shapes = st.builds(
    Shape, _widths.map(lambda found: tuple(sorted(found.items()))), st.integers(0, 10**6)
)


def _counted(
    shapes: tuple[Shape, Shape, Shape, Shape, Shape], unshaped: tuple[int, ...], read: int
) -> Passes:
    """Passes of given shapes, and others of which no shape is told, as by hand."""
    decoder, blocks, encoder, latent, scorer = (each.passes for each in shapes)
    return Passes(
        decoder=decoder + blocks + unshaped[0],
        encoder=latent + unshaped[1],
        encoder_bytes=encoder + unshaped[2],
        scorer=scorer + unshaped[3],
        draft=unshaped[4],
        draft_parameters=read,
        shapes=Shapes(*shapes),
    )


_read = st.integers(0, 10**9)
#: Without shapes first: what breaks a model is shown as simply as that goes.
passes = st.one_of(
    st.builds(Passes, _counts, _counts, _counts, _counts, _counts, _read),
    st.builds(_counted, st.tuples(*[_shapes] * 5), st.tuples(*[_counts] * 5), _read),
)
_sizes = st.integers(0, 10**10)
parameters = st.builds(Parameters, _sizes, _sizes, _sizes, _sizes, _sizes)
priced = st.tuples(passes, parameters)


def _cost(subject: Subject, example: tuple[Passes, Parameters], model: Any = None) -> Cost:
    found = (model or subject.build()).cost(*example)
    if not isinstance(found, Cost):
        raise Broken(f"gave {found!r}; expected a Cost", "cost_model.finite")
    return found


def _figures(cost: Cost) -> dict[str, Any]:
    return {"total": cost.total, **cost.lines, **cost.apart}


@COST_MODEL.add(
    "finite",
    "It gives a `Cost` whose figures are finite numbers, 0 or more, which JSON can spell.",
    lambda _: priced,
)
def _finite(subject: Subject, example: tuple[Passes, Parameters]) -> None:
    cost = _cost(subject, example)
    for name, figure in _figures(cost).items():
        number = isinstance(figure, Real) and not isinstance(figure, bool)
        if not number or not 0 <= float(figure) < math.inf:
            raise Broken(f"gave {name} = {figure!r}; expected a finite number, 0 or more")
    try:
        json.dumps(_figures(cost), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Broken(f"its figures cannot be written as JSON: {error}") from error


@COST_MODEL.add(
    "lines",
    "Its lines add up to the total; what is shown apart is in none of them.",
    lambda _: priced,
)
def _lines(subject: Subject, example: tuple[Passes, Parameters]) -> None:
    cost = _cost(subject, example)
    total = sum(cost.lines.values())
    if not math.isclose(total, cost.total, rel_tol=1e-9, abs_tol=1e-12):
        raise Broken(f"its lines add up to {total}, its total is {cost.total}")
    shared = cost.lines.keys() & cost.apart.keys()
    require(not shared, f"{sorted(shared)} stand among the lines and apart")


@COST_MODEL.add(
    "unit",
    "Its unit is a short text, the same for all passes: costs are compared.",
    lambda _: st.tuples(priced, priced),
)
def _unit(subject: Subject, example: tuple[Any, Any]) -> None:
    model = subject.build()
    units = [_cost(subject, each, model).unit for each in example]
    for unit in units:
        if not isinstance(unit, str) or not 0 < len(unit) <= LONGEST_UNIT:
            raise Broken(f"gave the unit {unit!r}; expected a text of 1 to {LONGEST_UNIT} letters")
    require(units[0] == units[1], f"it prices in {units[0]!r} and in {units[1]!r}")


@COST_MODEL.add(
    "monotone",
    "More passes never cost less.",
    lambda _: st.tuples(passes, passes, parameters),
)
def _monotone(subject: Subject, example: tuple[Passes, Passes, Parameters]) -> None:
    one, more, sizes = example
    less, most = _cost(subject, (one, sizes)), _cost(subject, (one + more, sizes))
    if most.total < less.total * (1 - 1e-12):
        raise Broken(f"{one + more} cost {most.total}, less than the {less.total} of {one}")


@COST_MODEL.add(
    "stateless",
    "The same passes of the same model always cost the same, whatever was priced before.",
    lambda _: st.lists(priced, min_size=2, max_size=4),
)
def _stateless(subject: Subject, example: list[tuple[Passes, Parameters]]) -> None:
    # The same passes of several models, and several passes of one, each before and after others.
    asked = [(counts, sizes) for counts, _ in example for _, sizes in example]
    want = [attrs.asdict(_cost(subject, each)) for each in asked]
    model = subject.build()
    for order in (1, -1):
        for each, alone in list(zip(asked, want, strict=True))[::order]:
            require(
                attrs.asdict(_cost(subject, each, model)) == alone,
                "the same passes cost something else once others, or another model's, were priced",
            )
