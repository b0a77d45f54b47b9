from __future__ import annotations

from typing import Any

import attrs
import pytest

from blt_core.component import (
    at_least,
    between,
    more_than,
    nested,
    nested_kinds,
    not_empty,
    one_of,
    overridable,
    overridable_keys,
)


@pytest.mark.parametrize(
    ("validator", "good", "bad", "message"),
    [
        (at_least(1), 1, 0, "expected at least 1, got 0"),
        (more_than(0), 0.5, 0, "expected more than 0, got 0"),
        (between(0, 1), 1, 1.5, "expected 0 to 1, got 1.5"),
        (one_of(1, "all"), "all", "none", "expected one of 1, 'all', got 'none'"),
        (at_least(0.0), 10**400, float("nan"), "expected a finite number, got nan"),
        (at_least(0.0), 0, float("inf"), "expected a finite number, got inf"),
        (more_than(0), 1, float("inf"), "expected a finite number, got inf"),
        (not_empty(), "x", "", "expected a text that is not empty, got ''"),
    ],
)
def test_ranges(validator, good, bad, message) -> None:
    field = attrs.fields(attrs.make_class("Params", ["x"])).x
    validator(None, field, good)
    validator(None, field, None)
    with pytest.raises(ValueError, match=message):
        validator(None, field, bad)


def test_fields_are_marked_by_what_they_hold() -> None:
    @attrs.frozen(kw_only=True)
    class Params:
        dim: int = 1
        window: int | None = overridable(default=None)
        drafter: Any = nested("drafter")
        verification: Any = nested("verification", default="greedy")

    assert nested_kinds(Params) == {"drafter": "drafter", "verification": "verification"}
    assert overridable_keys(Params) == {"window"}
    assert Params(drafter={}).verification == {"use": "greedy"}
