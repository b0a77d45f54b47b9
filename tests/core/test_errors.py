from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt_core.errors import ConfigError, PluginError, Problem, RunError, near_match


def test_hints_are_indented_below_their_problem() -> None:
    problem = Problem("a.toml: sampler.use", "no such thing.", ("installed: x", "one\ntwo"))
    assert str(problem) == "a.toml: sampler.use: no such thing.\n  installed: x\n  one\n  two"


def test_a_config_error_shows_all_its_problems() -> None:
    error = ConfigError([Problem("a", "first"), Problem("b", "second", ("hint",))])
    assert str(error) == "a: first\nb: second\n  hint"
    assert len(error.problems) == 2


def test_a_plugin_error_keeps_text_and_hints_apart() -> None:
    error = PluginError("text", ["fix: this"])
    assert (error.text, error.hints, str(error)) == ("text", ("fix: this",), "text\n  fix: this")


def test_exit_codes_part_bad_inputs_from_failed_runs() -> None:
    assert (ConfigError([]).exit_code, RunError().exit_code) == (2, 1)


@pytest.mark.parametrize(
    ("name", "near"),
    [("blt-vd", "blt-dv"), ("block_size", "block_bytes"), ("vd-blt", "blt-dv"), ("xyzzy", "")],
)
def test_near_matches(name: str, near: str) -> None:
    found = near_match(name, ["ar", "blt-dv", "block_bytes"])
    assert found == (f" Did you mean {near!r}?" if near else "")


@given(st.text(min_size=1), st.lists(st.text()))
def test_a_near_match_is_always_one_of_the_candidates(name: str, candidates: list[str]) -> None:
    found = near_match(name, candidates)
    assert found in {"", *(f" Did you mean {each!r}?" for each in candidates)}
