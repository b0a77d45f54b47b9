"""What the kit tells, on the command line, to pytest and to programs."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from blt_core import Component, Kind, hookimpl
from blt_core.cli.app import run
from blt_core.decoding.engine import Request, decode
from blt_core.decoding.state import DecodeState
from blt_core.errors import ComponentError, EngineError, PluginError
from blt_core.plugins.loading import load_plugins
from blt_core.testing import (
    Broken,
    ContractError,
    Contracts,
    Profile,
    check_component,
    contracts_of,
    try_component,
)
from blt_core.types import Draft, Sampling
from tests.conformance import mutants_decoding, mutants_parts
from tests.engine import models

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = load_plugins(
    extra=[("blt-mutants", "parts", mutants_parts), ("blt-mutants", "rest", mutants_decoding)]
)


# -- what an author is told ------------------------------------------------------------------------


def test_the_error_names_component_contract_page_and_the_smallest_example():
    with pytest.raises(ContractError) as found:
        check_component("patcher", "broken/it", {"fault": "looks-ahead"}, plugins=PLUGINS)
    error = found.value
    assert error.contract == "patcher.causal"
    assert error.page == "docs/kinds/patcher.md#causal"
    # Two bytes besides BOS: a first whose flag changes with the second.
    assert len(error.example[0]) == 3
    assert str(error).startswith("patcher 'broken/it' (blt-mutants) breaks patcher.causal: row 1 ")


def test_all_contracts_are_tried_where_one_is_broken():
    results = list(
        try_component(
            "cost_model", "broken/it", {"fault": "odd-total"}, plugins=PLUGINS, profile="dev"
        )
    )
    assert [r.contract for r in results] == [c.name for c in contracts_of("cost_model")]
    assert [r.contract for r in results if not r.passed] == ["cost_model.lines"]


def test_a_component_that_is_not_built_is_tried_no_further():
    [result] = try_component("patcher", "broken/it", {"fautl": "x"}, plugins=PLUGINS)
    assert (result.contract, result.passed) == ("patcher.builds", False)
    assert "Did you mean 'fault'?" in result.error.text


def test_names_that_are_not_there():
    with pytest.raises(PluginError, match="no kind 'sampelr'"):
        contracts_of("sampelr")
    with pytest.raises(PluginError, match="no profile 'quick'"):
        check_component("cost_model", "bandwidth", profile="quick")


def test_the_same_examples_are_tried_each_time():
    def tried():
        with pytest.raises(ContractError) as found:
            check_component("global_model", "broken/it", {"fault": "half-rewind"}, plugins=PLUGINS)
        return found.value.example

    assert tried() == tried()


# -- the command line ------------------------------------------------------------------------------


def test_the_command_tells_each_contract(capsys):
    arguments = ["cost_model", "bandwidth", "--set", "bytes_per_parameter=1.0"]
    code, told = run(["plugins", "test", *arguments]), capsys.readouterr()
    assert code == 0, told.err
    lines = told.out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == [c.name for c in contracts_of("cost_model")]
    assert lines[-1] == "cost_model 'bandwidth': 8 contracts hold, 0 are broken, 0 do not apply"


def test_a_broken_contract_ends_the_command_with_1(monkeypatch, capsys):
    monkeypatch.setattr("blt_core.cli.inspecting.load_plugins", lambda: PLUGINS)
    arguments = ["plugins", "test", "cost_model", "broken/it", "--set", "fault=negative", "--json"]
    assert run(arguments) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["component"] == "cost_model/broken/it"
    checks = {each["contract"]: each for each in told["checks"]}
    assert checks["cost_model.finite"]["passed"] is False
    assert "Passes(" in checks["cost_model.finite"]["example"]
    assert checks["cost_model.builds"]["passed"] is True
    assert checks["cost_model.builds"]["example"] is None
    assert all(each["seconds"] >= 0 for each in told["checks"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test", "cost_model"], "expected blt plugins test KIND NAME"),
        (["test", "cost", "bandwidth"], "cost_model"),
        (["test", "cost_model", "bandwith"], "Did you mean 'bandwidth'?"),
        (["test", "cost_model", "bandwidth", "--profile", "quick"], "no profile 'quick'"),
        (["cost_model", "--set", "a=1"], "--set is for blt plugins test"),
    ],
)
def test_what_the_command_refuses(arguments, message, capsys):
    code, told = run(["plugins", *arguments]), capsys.readouterr()
    assert (code, told.out) == (2, "")
    assert message in told.err


def test_the_command_tries_the_contracts_that_are_named(capsys):
    options = ["--contract", "finite", "--contract", "cost_model.lines"]
    assert run(["plugins", "test", "cost_model", "bandwidth", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["cost_model.finite", "cost_model.lines"]
    assert run(["plugins", "test", "cost_model", "bandwidth", "--contract", "finit"]) == 2
    assert "Did you mean 'cost_model.finite'?" in capsys.readouterr().err


def test_what_never_came_up_is_noted(monkeypatch, capsys):
    monkeypatch.setattr("blt_core.cli.inspecting.load_plugins", lambda: PLUGINS)
    arguments = ["plugins", "test", "unmasking", "broken/it", "--profile", "3"]
    assert run(arguments) == 0
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["unmasking.draws"].endswith("note: it drew nothing in any example")
    assert "note" not in lines["unmasking.batch"]
    [told] = [
        each
        for each in check_component(
            "unmasking", "broken/it", {"fault": "draws-right"}, plugins=PLUGINS, profile="3"
        )
        if each.contract == "unmasking.draws"
    ]
    assert told.to_dict()["note"] is None


# -- pytest ----------------------------------------------------------------------------------------

TESTS = """
from blt_core.testing import conformance

@conformance("cost_model", "bandwidth")
def test_bandwidth(contract):
    contract()

@conformance("unmasking", "all", known={"unmasking.batch": "it is being mended"}, profile="dev")
def test_all(contract):
    contract()
"""


def test_conformance_makes_a_test_of_each_contract(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", str(tmp_path)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert "PASSED" in run.stdout
    assert "test_bandwidth[cost_model.monotone]" in run.stdout
    # A known failure that does not fail is told.
    assert re.search(r"FAILED .*test_all\[unmasking.batch\]", run.stdout)
    assert "blt conformance: profile dev; plugins of blt-core 0.1.0" in run.stdout
    assert run.returncode == 1


def test_the_pytest_plugin_imports_nothing_until_it_is_used(tmp_path):
    (tmp_path / "test_other.py").write_text(
        "import sys\n\n"
        "def test_it():\n"
        "    assert 'pytest_blt' in sys.modules\n"
        "    for name in ('torch', 'blt_core'):\n"
        "        assert name not in sys.modules\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
    ]
    run = subprocess.run(
        [*command, str(tmp_path)], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stdout
    assert "blt conformance" not in run.stdout


def test_a_contract_without_its_marker(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it(contract):\n    contract()\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert "mark the test with @blt_core.testing.conformance" in run.stdout


# -- kinds of other distributions ------------------------------------------------------------------


class Greeter:
    """What the kind below asks for."""

    def greet(self, name: str) -> str: ...


GREETER = Contracts("greeter")


@GREETER.add("polite", "It greets by name.")
def _polite(subject, _):
    if "Ada" not in subject.build().greet("Ada"):
        raise Broken("it does not say the name")


@attrs.frozen(kw_only=True)
class GreeterParams:
    """text: what is said."""

    text: str = "hello"


class Says:
    def __init__(self, params, context):
        self.text = params.text

    def greet(self, name):
        return f"{self.text} {name if self.text == 'hello' else ''}"


class Zoo:
    @hookimpl
    def blt_kinds(self):
        return {
            "greeter": Kind(f"{__name__}:Greeter", "greets", contracts=f"{__name__}:GREETER"),
            "silent": Kind(f"{__name__}:Greeter", "greets, untested"),
        }

    @hookimpl
    def blt_components(self):
        return [Component("greeter", "says", Says, GreeterParams, "says a text")]


def test_a_kind_of_a_plugin_brings_its_contracts():
    plugins = load_plugins(extra=[("blt-zoo", "zoo", Zoo())])
    names = [each.contract for each in check_component("greeter", "says", plugins=plugins)]
    assert names == ["greeter.builds", "greeter.defaults", "greeter.described", "greeter.polite"]
    with pytest.raises(ContractError, match=r"breaks greeter\.polite: it does not say the name"):
        check_component("greeter", "says", {"text": "hi"}, plugins=plugins)
    with pytest.raises(PluginError, match="the kind 'silent' names no contracts"):
        contracts_of("silent", plugins)


# -- pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", load_plugins().manifest.kinds)
def test_a_kind_s_page_has_a_heading_for_each_contract(kind):
    page = (ROOT / "docs" / "kinds" / f"{kind}.md").read_text(encoding="utf-8")
    contracts = contracts_of(kind)
    assert re.findall(r"^## (\S+)$", page, re.MULTILINE) == [
        c.name.partition(".")[2] for c in contracts
    ]
    for contract in contracts:
        assert contract.says in page


def test_contracts_that_the_core_names_have_a_heading():
    kinds = "|".join(load_plugins().manifest.kinds)
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "blt_core").rglob("*.py")]
    named = {name for text in texts for name in re.findall(rf'"((?:{kinds})\.[a-z-]+)"', text)}
    known = {c.name for kind in load_plugins().manifest.kinds for c in contracts_of(kind)}
    abilities = {"decoder.denoises", "decoder.reads_byte_states", "patcher.byte_scorer"}
    assert {name for name in named if name not in known} <= abilities


# -- guards at run time ----------------------------------------------------------------------------

REQUESTS = [Request(b"ab 1(", 40), Request(b"ab", 30)]


def decoded(model, sampler):
    return list(decode(model, sampler, REQUESTS, Sampling()))


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (kind, fault)
        for kind in ("patcher", "encoder", "global_model", "decoder")
        for fault in ("rewind-noop", "zero-lengths")
    ],
)
def test_a_cache_that_tells_other_lengths_is_named_while_it_runs(kind, fault):
    from blt_core.testing.kit import subject_of
    from blt_core.testing.subject import Subject

    subject: Subject = subject_of(kind, "broken/it", {"fault": fault}, PLUGINS)
    sampler = subject.built("sampler", {"use": "blt-dv", "block_bytes": 8})
    with pytest.raises(ComponentError, match=f"{kind.replace('_', ' ')} 'broken/it'") as found:
        decoded(subject.model, sampler)
    assert found.value.contract == f"{kind}.lengths"
    assert f"contract: {kind}.lengths (docs/kinds/{kind}.md#lengths)" in str(found.value)


class Rewrites(mutants_decoding.Sampler):
    """Changes the last byte that was output, where the patch is still open."""

    def __init__(self):
        super().__init__(mutants_decoding.Params(), None)

    def round(self, ops, sampling, draws):
        done = super().round(ops, sampling, draws)
        added = [len(ids) for ids in done.ids]
        if not done.prefill:
            try:
                ops.rewind([n - k - 1 for n, k in zip(ops.lengths, added, strict=True)])
            except EngineError:
                return done
            ops.append([[90, *ids] for ids in done.ids])
        return done


def test_text_that_was_output_may_not_be_changed():
    told = []
    for index in range(8):
        try:
            decoded(models.model(index), Rewrites())
        except EngineError as error:  # noqa: PERF203
            told.append((error.contract, error.text))
    assert told
    assert {contract for contract, _ in told} == {"sampler.keeps-text"}
    assert all("that were output already" in text for _, text in told)


class Puts(mutants_decoding.Sampler):
    """Cuts the last byte that was output off, and puts it there again."""

    def __init__(self):
        super().__init__(mutants_decoding.Params(), None)

    def round(self, ops, sampling, draws):
        before = [ops.text(row) for row in range(len(ops.lengths))]
        with contextlib.suppress(EngineError):  # the patch of one of them has ended there
            ops.rewind([n - 1 for n in ops.lengths])
        ops.append([ids[len(ops.text(row)) :] for row, ids in enumerate(before)])
        return super().round(ops, sampling, draws)


def test_text_that_is_put_there_again_is_unchanged():
    for index in range(4):
        plain = mutants_decoding.Sampler(mutants_decoding.Params(), None)
        want = [s.new for s in decoded(models.model(index), plain)]
        assert [s.new for s in decoded(models.model(index), Puts())] == want


def test_a_rewind_that_is_refused_for_one_text_cuts_none():
    model = models.model(0)
    state = DecodeState(model, [[97, 98, 99], [97] * 12], [9, 9])
    state.next_logits([1, 1])
    state.settle()
    state.append([[97], [97]])
    before = state.lengths
    with pytest.raises(EngineError, match="batch row 1: cannot rewind to 1 ids"):
        state.rewind([before[0] - 1, 1])
    assert state.lengths == before


def test_an_error_of_a_contract_names_it():
    class Proposes:
        def draft(self, ops, limit, sampling, draws):
            return Draft([[9999], [1]])

    from tests.engine.runs import speculative

    with pytest.raises(ComponentError) as found:
        decoded(models.model(0), speculative(Proposes()))
    assert found.value.contract == "drafter.proposes"
    assert "docs/kinds/drafter.md#proposes" in str(found.value)


def test_a_profile_of_one_s_own():
    results = check_component("unmasking", "all", profile=Profile(3, shrinks=False))
    assert {each.passed for each in results} == {True}
