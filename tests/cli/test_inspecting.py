from __future__ import annotations

import json

import attrs
import pytest
import tomli

from blt_core.cli import inspecting
from blt_core.component import Component
from blt_core.hookspecs import hookimpl
from blt_core.plugins.loading import load_plugins
from blt_core.plugins.registry_file import load_manifest
from blt_core.wiring.resolve import resolve_component
from blt_plugins.cost import probing


def test_plugins_lists_every_kind_that_has_components(blt):
    listed = json.loads(blt("plugins", "--json").out)
    names = {(c["kind"], c["name"]) for c in listed["components"]}
    assert {("patcher", "entropy"), ("sampler", "ar"), ("drafter", "self")} <= names
    assert listed["broken"] == []


def test_plugins_of_one_kind_shows_keys(blt):
    out = blt("plugins", "sampler").out.decode()
    assert "draft_bytes" in out
    assert "patcher" not in out
    assert blt("plugins", "smapler").code == 2


def test_check_prints_a_config_that_checks_to_itself(blt, run_config, tmp_path):
    first = blt("check", run_config('[sampler]\nuse = "blt-s"')).out
    tables = tomli.loads(first.decode())
    assert tables["sampler"]["use"] == "speculative"
    assert tables["sampler"]["drafter"] == {"use": "self", "draft_bytes": 8}
    del tables["run"]["checkpoint"]
    path = tmp_path / "again.toml"
    path.write_bytes(first)
    whole = path.read_text().replace(
        f'checkpoint = "{tomli.loads(first.decode())["run"]["checkpoint"]}"', ""
    )
    path.write_text(whole)
    assert tomli.loads(blt("check", path).out.decode()) == tables


def test_cost_reproduces_the_printed_column_within_0_75_percent(blt):
    rows = json.loads(blt("cost", "--json").out)["rows"]
    assert len(rows) == 8
    assert all(abs(row["deviation_percent"]) <= 0.75 for row in rows)
    assert "deviation" in blt("cost").out.decode()


def test_cost_without_the_factor_is_half(blt):
    given = ("cost", "--n-dec", 512, "--n-enc", 308, "--json")
    two = json.loads(blt(*given).out)["gigabytes"]
    one = json.loads(blt(*given, "--bytes-per-parameter", 1).out)["gigabytes"]
    assert one == two / 2
    assert blt("cost", "--n-dec", 5).code == 2
    assert blt("cost", "--scale", "7b").code == 2


def test_version_and_help(blt):
    assert blt("--version").out.startswith(b"blt ")
    for command in (
        "generate",
        "compare",
        "plugins",
        "check",
        "cost",
        "train",
        "calibrate",
        "calibrate-cost",
    ):
        assert blt(command, "--help").code == 0


def test_show_tells_all_of_a_component(blt):
    shown = json.loads(blt("plugins", "show", "drafter", "diffusion", "--json").out)
    keys = {key.pop("name"): key for key in shown["keys"]}
    assert keys["block_bytes"] == {
        "type": "int",
        "required": False,
        "default": 8,
        "range": "at least 1",
        "meaning": "bytes of a block (B).",
    }
    assert keys["unmasking"]["default"] == {"use": "all"}
    assert keys["start"]["type"] == "'aligned' or 'frontier'"
    assert keys["closure"]["meaning"].startswith('of a frontier block: "forced" closes')
    assert (shown["distribution"], shown["entry_point"]) == ("blt-core", "drafting")
    assert shown["object"] == "blt_plugins.drafting.diffusion:DiffusionDrafter"
    assert (shown["requires"], shown["provides"]) == (
        ["decoder.denoises"],
        ["gives_q", "stops_early"],
    )
    assert shown["expands_to"] is None
    out = blt("plugins", "show", "drafter", "diffusion").out.decode()
    for text in (
        "block_bytes: int, at least 1; default 8",
        "bytes of a block (B).",
        "[sampler.",
    ):
        assert text in out


def test_show_of_a_part_has_its_dims_abilities_and_what_is_required(blt):
    shown = json.loads(blt("plugins", "show", "decoder", "local", "--json").out)
    assert shown["dims"] == {"latent_dim": "latent_dim"}
    assert shown["provides"] is None  # keys without a default decide
    assert [key["name"] for key in shown["keys"] if key["required"]][:2] == ["dim", "layers"]
    assert "# dim = …  int, at least 2" in shown["example"]


def test_show_of_a_preset_has_what_it_stands_for(blt):
    shown = json.loads(blt("plugins", "show", "sampler", "blt-s", "--json").out)
    assert shown["expands_to"]["drafter"] == {"use": "self", "draft_bytes": 8}
    assert "speculative" in blt("plugins", "show", "sampler", "blt-s").out.decode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "sampler", "blt-z"), "no sampler named 'blt-z'. Did you mean 'blt-s'?"),
        (("show", "smapler", "ar"), "no kind named 'smapler'. Did you mean 'sampler'?"),
        (("show", "sampler", "cascade"), "it is a drafter"),
        (("show", "sampler"), "expected blt plugins show KIND NAME"),
        (("sampler", "ar"), "expected blt plugins [KIND]"),
    ],
)
def test_show_of_what_is_not_there(blt, arguments, message):
    outcome = blt("plugins", *arguments)
    assert (outcome.code, outcome.out) == (2, b"")
    assert message in outcome.err


def test_every_example_is_toml_and_checks_where_nothing_is_required():
    from blt_core.cli.describing import describe

    loaded = load_plugins()
    for entry in loaded.registry.entries:
        shown = describe(loaded, entry)
        tables = tomli.loads(shown["example"])
        kind = entry.record.kind
        if kind in loaded.manifest.roots and not any(key["required"] for key in shown["keys"]):
            resolve_component(kind, tables[kind], loaded)
        if entry.origin.distribution == "blt-core":
            meant = [key["name"] for key in shown["keys"] if key["meaning"]]
            assert meant or all(key["required"] for key in shown["keys"]), shown["name"]


@attrs.frozen
class Bare:
    draft_bytes: int = 4


@attrs.frozen
class Wordy:
    """Says nothing of its keys."""

    draft_bytes: int = 4


@pytest.mark.parametrize("params", [Bare, Wordy])
def test_keys_without_a_word_in_the_docstring_are_shown_without_a_meaning(params):
    from blt_core.cli.describing import describe

    class Plugin:
        @hookimpl
        def blt_components(self):
            return [Component("drafter", "acme/echo", Echo, params, "repeats the last byte")]

    loaded = load_plugins(extra=[("blt-acme", "acme", Plugin())])
    assert not loaded.broken
    shown = describe(loaded, loaded.registry.lookup("drafter", "acme/echo"))
    [key] = shown["keys"]
    assert (key["name"], key["default"], key["meaning"]) == ("draft_bytes", 4, None)


class Echo:
    def __init__(self, params, context): ...

    def draft(self, ops, limit, sampling, draws): ...


@pytest.mark.parametrize(
    ("sampler", "note"),
    [
        ("speculative drafter.use=cascade drafter.draft_bytes=2 drafter.drafter.use=self",
         "--sampler: drafter: drafter 'self' proposes 8 bytes, of which a draft of 2 has room"),
        ("speculative drafter={use=cascade,drafter={use=diffusion,start=frontier}}",
         '--sampler: drafter: closure = "forced" costs an encoder + global pass in each refill'),
        ("speculative drafter.use=cascade", ""),
        ("blt-dv start=frontier", ""),
    ],
)  # fmt: skip
def test_check_notes_keys_that_are_hardly_meant(blt, sampler, note):
    outcome = blt("check", "demo", "--sampler", sampler)
    assert outcome.code == 0
    assert outcome.err.startswith(f"note: {note}") if note else outcome.err == ""


@attrs.frozen
class NoKeys:
    pass


class Sampler:
    def __init__(self, params, context): ...
    def check(self, sampling): ...
    def round(self, ops, sampling, draws): ...


class Acme:
    @hookimpl
    def blt_components(self):
        summary = "the [/last] of [its] kind :smile:"
        return [Component("sampler", name, Sampler, NoKeys, summary) for name in ("ar", "tree")]


class Broken:
    @hookimpl
    def blt_components(self):
        raise ImportError("see [prefer.sampler] and [/x]")


@pytest.fixture
def with_acme(monkeypatch, tmp_path):
    """The installed plugins, one that says odd things, and one that fails to say them."""
    policy = tmp_path / "registry.toml"
    policy.write_text('schema = 1\nblocked = ["sampler/tree"]\n')
    monkeypatch.chdir(tmp_path)
    loaded = load_plugins(load_manifest(), extra=[("acme", "x", Acme()), ("odd", "y", Broken())])
    monkeypatch.setattr(inspecting, "load_plugins", lambda: loaded)


def test_what_plugins_say_is_printed_as_it_is(blt, with_acme):
    out = blt("plugins").out.decode()
    assert "the [/last] of [its] kind :smile:" in out
    assert "plugin 'y' (odd) is broken: ImportError: see [prefer.sampler] and [/x]" in out


def test_plugins_says_which_components_cannot_be_named(blt, with_acme):
    listed = json.loads(blt("plugins", "sampler", "--json").out)["components"]
    status = {(c["distribution"], c["name"]): c["status"] for c in listed}
    assert status["blt-core", "blt-s"] == "ok"
    assert status["blt-core", "ar"] == "conflict with acme"
    assert status["acme", "ar"] == "conflict with blt-core"
    assert status["acme", "tree"] == "blocked by registry.toml"
    out = blt("plugins").out.decode()
    assert "blocked by registry.toml" in out
    assert out.split("\n")[0].split() == ["kind", "name", "from", "status", "what", "it", "is"]


def test_status_is_shown_only_where_it_says_something(blt):
    assert "status" not in blt("plugins").out.decode().split("\n")[0]


def test_a_printed_config_checks_beside_its_checkpoint(blt, run_config, tmp_path):
    first = blt("check", run_config('[sampler]\nuse = "blt-s"')).out
    path = tmp_path / "full.toml"
    path.write_bytes(first)
    again = blt("check", path)
    assert (again.code, again.out) == (0, first)


def test_calibrate_cost_stores_what_roofline_prices_with(blt, run_config, tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "SECONDS", 0.0)
    monkeypatch.setattr(probing, "PROMPT_TURNS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = ("cost", "--n-dec", 512, "--n-enc", 128, "--json", "--cost-model", "roofline")
    refused = blt(*asked)
    assert (refused.code, refused.out) == (2, b"")
    assert "fix: blt calibrate-cost" in refused.err
    found = json.loads(blt("calibrate-cost", run_config(), "--json").out)
    assert found["machine"]["dtype"] == "float32"
    assert found["file"].startswith(str(tmp_path / "cache" / "blt-core"))
    priced = json.loads(blt(*asked).out)
    assert (priced["cost_unit"], priced["gigabytes"]) == ("s", None)
    assert priced["cost"] == pytest.approx(sum(priced["lines"].values()))
    shown = blt("calibrate-cost", run_config(), "--output", tmp_path / "here.json")
    assert "global_model" in shown.out.decode()
    run = ("generate", run_config(), "--prompt", "x", "--max-new-bytes", 9, "--json")
    table = run_config(f'[cost_model]\nuse = "roofline"\nfile = "{tmp_path / "here.json"}"')
    [record] = [json.loads(line) for line in blt("generate", table, *run[2:]).out.splitlines()]
    assert record["cost_unit"] == "s"
    assert record["cost"] > 0
    table = run_config('[cost_model]\nuse = "roofline"')
    assert blt("generate", table, *run[2:]).code == 0
    refused = blt("generate", table, *run[2:], "--kernels", "measured")
    assert (refused.code, refused.out) == (2, b"")
    assert "measured kernels" in refused.err
    found = json.loads(blt("calibrate-cost", run_config(), "--kernels", "measured", "--json").out)
    assert found["machine"]["variant"] == "measured kernels"
    assert blt("generate", table, *run[2:], "--kernels", "measured").code == 0
