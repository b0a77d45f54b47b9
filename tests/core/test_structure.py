from __future__ import annotations

import enum
from pathlib import Path
from typing import Any, Literal, Optional, Union

import attrs
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from blt_core.component import at_least
from blt_core.tables.place import Place, Table
from blt_core.tables.structure import (
    Invalid,
    UnsupportedType,
    check_params,
    plain,
    read_table,
    reader,
)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@attrs.frozen
class Inner:
    size: int = attrs.field(validator=at_least(1))
    name: str | None = None


@attrs.frozen
class Outer:
    number: int
    ratio: float = 1.0
    flag: bool = False
    colour: Colour = Colour.RED
    mode: Literal["fast", "exact"] = "fast"
    words: tuple[str, ...] = ()
    inners: list[Inner] = attrs.field(factory=list)
    table: dict[str, float] = attrs.field(factory=dict)
    inner: Optional[Inner] = None  # noqa: UP045 -- an old spelling that must work too
    either: Union[int, str] = 0  # noqa: UP007 -- likewise
    folder: Path = Path()


def read(**values: Any) -> Outer:
    return read_table(Outer, Table(values, Place("a.toml", "outer")), "outer 'x'")


def complaints(**values: Any) -> list[str]:
    with pytest.raises(Invalid) as caught:
        read(**values)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"number": 8.5}, "number: expected int, got float 8.5"),
        ({"number": 8.0}, "number: expected int, got float 8.0"),
        ({"number": "8"}, "number: expected int, got str '8'"),
        ({"number": True}, "number: expected int, got bool true"),
        ({"number": None}, "number: expected int, got nothing"),
        ({"ratio": True}, "ratio: expected float, got bool true"),
        ({"ratio": "1"}, "ratio: expected float, got str '1'"),
        ({"ratio": 10**400}, "ratio: too large for a float"),
        ({"flag": 1}, "flag: expected bool, got int 1"),
        ({"flag": "false"}, "flag: expected bool, got str 'false'"),
        ({"colour": "bleu"}, "colour: expected one of 'red', 'blue', got str 'bleu'."),
        ({"mode": "exakt"}, "mode: expected one of 'fast', 'exact', got str 'exakt'."),
        ({"mode": 1}, "mode: expected one of 'fast', 'exact', got int 1"),
        ({"words": "abc"}, "words: expected a list of str, got str 'abc'"),
        ({"words": ["a", 2]}, "words[1]: expected str, got int 2"),
        ({"inners": [{"size": 1}, {"size": 0}]}, "inners[1].size: expected at least 1, got 0"),
        ({"table": {"a": "b"}}, "table.a: expected float, got str 'b'"),
        ({"table": []}, "table: expected a table of float, got a list"),
        ({"inner": 3}, "inner: expected a table, got int 3"),
        ({"inner": {"size": 1, "nmae": ""}}, "inner.nmae: unknown key. Did you mean 'name'?"),
        ({"inner": {}}, "inner.size: missing; this table needs it: int"),
        ({"either": 1.5}, "either: expected int or str, got float 1.5"),
        ({"folder": 3}, "folder: expected str, got int 3"),
        ({"words": ["x" * 99, 1]}, "words[1]: expected str, got int 1"),
        ({"flag": 16**5000}, f"flag: expected bool, got int 0x1{'0' * 57}…"),
        ({"flag": "x" * 99}, f"flag: expected bool, got str '{'x' * 59}…"),
    ],
)
def test_nothing_is_coerced(values, message) -> None:
    (complaint,) = complaints(**{"number": 1, **values})
    assert complaint.startswith(f"a.toml: outer.{message}")


def test_near_matches_of_choices() -> None:
    assert complaints(number=1, mode="exakt")[0].endswith("Did you mean 'exact'?")


def test_all_faults_in_the_order_of_the_file() -> None:
    assert complaints(words=3, flagg=True, flag=0) == [
        "a.toml: outer.words: expected a list of str, got int 3",
        (
            "a.toml: outer.flagg: unknown key. Did you mean 'flag'?\n"
            "  outer 'x' takes: number, ratio, flag, colour, mode, words, inners, table, inner, "
            "either, folder"
        ),
        "a.toml: outer.flag: expected bool, got int 0",
        "a.toml: outer.number: missing; outer 'x' needs it: int",
    ]


def test_what_is_accepted() -> None:
    assert read(number=1, ratio=2).ratio == 2.0
    assert isinstance(read(number=1, ratio=2).ratio, float)
    assert read(number=1, colour="blue").colour is Colour.BLUE
    assert read(number=1, words=["a"]).words == ("a",)
    assert read(number=1, either="all").either == "all"
    assert read(number=1, folder="x/y").folder == Path("x/y")
    assert read(number=1, inner=None).inner is None


def test_a_class_may_refuse_a_combination_of_keys() -> None:
    @attrs.frozen
    class Pair:
        low: int = 0
        high: int = 0

        def __attrs_post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError("low is above high")

    with pytest.raises(Invalid) as caught:
        read_table(Pair, Table({"low": 1}, Place("a.toml", "pair")), "pair")
    assert str(caught.value.problems[0]) == "a.toml: pair: low is above high"


def test_whatever_a_class_raises_is_a_problem_of_its_table() -> None:
    @attrs.frozen
    class Buggy:
        x: int = 1

        def __attrs_post_init__(self) -> None:
            raise KeyError("y")

    @attrs.frozen
    class BuggyValidator:
        x: int = attrs.field(default=1, validator=lambda *_: {}["y"])

    for params, message in (
        (Buggy, "a.toml: it: sampler 'x' failed: KeyError: 'y'"),
        (BuggyValidator, "a.toml: it.x: KeyError: 'y'"),
    ):
        with pytest.raises(Invalid) as caught:
            read_table(params, Table({"x": 1}, Place("a.toml", "it")), "sampler 'x'")
        assert str(caught.value.problems[0]) == message


inners = st.builds(Inner, st.integers(min_value=1), st.none() | st.text())
outers = st.builds(
    Outer,
    number=st.integers(),
    ratio=st.floats(allow_nan=False),
    flag=st.booleans(),
    colour=st.sampled_from(Colour),
    mode=st.sampled_from(["fast", "exact"]),
    words=st.lists(st.text()).map(tuple),
    inners=st.lists(inners),
    table=st.dictionaries(st.text(), st.floats(allow_nan=False)),
    inner=st.none() | inners,
    either=st.integers() | st.text(),
    folder=st.text(st.characters(codec="ascii", exclude_characters="\0")).map(Path),
)


@given(outers)
def test_plain_values_read_back_as_the_same_instance(outer) -> None:
    assert read(**plain(outer)) == outer


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars, lambda below: st.lists(below) | st.dictionaries(st.text(), below), max_leaves=6
)


@given(st.dictionaries(st.sampled_from([f.name for f in attrs.fields(Outer)]), values))
def test_any_table_is_read_exactly_or_refused_with_a_place(table) -> None:
    try:
        outer = read(**table)
    except Invalid as error:
        refused = error.problems or pytest.fail("refused for no reason")
        event(f"refused for {len(refused)}")
        places = [problem.place.startswith("a.toml: outer.") for problem in refused]
    else:
        event("read")
        same = plain(outer)
        places = [same[key] == table[key] for key in table.keys() & same.keys() - {"folder"}]
    assert all(places)


@pytest.mark.parametrize(
    "kind",
    [Any, object, bytes, list, dict, tuple, dict[int, int], tuple[int, str], list[Any]],
)
def test_types_that_no_table_can_spell_are_refused(kind) -> None:
    with pytest.raises(UnsupportedType, match="not a type that a TOML table can spell"):
        reader(kind)
    with pytest.raises(UnsupportedType, match=r"Params\.x: .* can spell"):
        check_params(attrs.make_class("Params", {"x": attrs.field(type=kind)}))
