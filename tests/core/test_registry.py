from __future__ import annotations

import functools
from typing import Any

import attrs
import pytest
import torch

from blt_core.component import Component, Preset, nested
from blt_core.errors import PluginError
from blt_core.hookspecs import hookimpl
from blt_core.plugins.registry import check_record
from blt_core.plugins.registry_file import load_manifest
from blt_core.protocols import Sampler


@attrs.frozen
class Keys:
    dim: int = 1
    part: Any = nested("drafter", default="self")


@attrs.frozen
class NestedUnknown:
    part: Any = nested("draftr")


@attrs.frozen
class Bytes:
    data: bytes = b""


@attrs.frozen
class Stuck:
    window: int | None = 512


@attrs.frozen
class StuckBelow:
    inner: Stuck = attrs.field(factory=Stuck)


ALLOWS_NONE = "its type allows None, so None must be its default: TOML has no null to set it"


@attrs.frozen
class Unresolved:
    part: NoSuchName = 1  # noqa: F821


@attrs.define
class Reserved:
    use: str = ""


Bare = attrs.make_class("Bare", ["x"])


@pytest.fixture
def refusal(manifest):
    """The message that registering a record raises."""

    def refusal(record) -> str:
        with pytest.raises(PluginError) as caught:
            check_record(record, manifest)
        return str(caught.value)

    return refusal


# -- records -------------------------------------------------------------------------------------


def test_all_the_fakes_pass(manifest, fakes) -> None:
    for record in fakes.COMPONENTS:
        check_record(record, manifest)


def test_what_is_no_component(refusal) -> None:
    assert refusal("ar") == "blt_components gave 'ar', which is no Component or Preset"


@pytest.mark.parametrize("name", ["AR", "", "a b", "/x", "a/b/c", "a/", "-x"])
def test_ill_formed_names(refusal, fakes, name) -> None:
    record = fakes.component("sampler", name, fakes.FakeSampler)
    assert refusal(record) == f"sampler {name!r}: a name is lower-case, as in 'tree' or 'acme/tree'"


@pytest.mark.parametrize("name", ["ar", "acme/tree", "blt-dv", "v2.0_x"])
def test_well_formed_names(manifest, fakes, name) -> None:
    check_record(fakes.component("sampler", name, fakes.FakeSampler), manifest)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (dict, "params must be an attrs class, not <class 'dict'>"),
        (Bytes, "Bytes.data: <class 'bytes'> is not a type that a TOML table can spell"),
        (Stuck, f"Stuck.window: {ALLOWS_NONE}"),
        (StuckBelow, f"StuckBelow.inner: Stuck.window: {ALLOWS_NONE}"),
        (Bare, "Bare.x: has no annotation"),
        (Reserved, "Reserved.use: this name cannot be a key"),
        (
            Unresolved,
            "Unresolved: an annotation cannot be resolved: name 'NoSuchName' is not defined",
        ),
        (NestedUnknown, "part: no kind named 'draftr'. Did you mean 'drafter'?"),
    ],
)
def test_params_that_no_table_can_set(refusal, fakes, params, message) -> None:
    record = fakes.component("sampler", "x", fakes.FakeSampler, params)
    assert refusal(record) == f"sampler 'x': {message}"
    preset = Preset("sampler", "x", params, lambda _: {}, "")
    assert refusal(preset) == f"sampler 'x': {message}"


@pytest.mark.parametrize("field", ["din", "part"])
def test_dims_name_fields(refusal, fakes, field) -> None:
    record = fakes.component("sampler", "x", fakes.FakeSampler, Keys, dims={"width": field})
    assert f"dims: 'width' names the field {field!r}, which Keys does not have." in refusal(record)


@pytest.mark.parametrize("requirement", ["decodr.denoises", "decoder", "decoder."])
def test_requirements_name_a_kind_and_an_ability(refusal, fakes, requirement) -> None:
    needs = frozenset({requirement})
    record = fakes.component("sampler", "x", fakes.FakeSampler, requires=needs)
    assert f"requires: expected 'kind.ability', got {requirement!r}." in refusal(record)


# -- factories and signatures --------------------------------------------------------------------


def sampler(factory: Any) -> Component:
    return Component("sampler", "x", factory, Keys, "")


def test_factories_take_params_and_context(refusal) -> None:
    assert "factory must take (params, context): too many" in refusal(sampler(lambda _: None))


def variant(**methods: Any) -> type:
    def construct(self, params, context): ...
    def check(self, sampling): ...
    def fine(self, ops, sampling, draws): ...

    return type("Variant", (), {"__init__": construct, "check": check, "round": fine, **methods})


FAULTY = {
    "missing": (None, "method 'round' is missing; expected round(ops, sampling, draws)"),
    "fewer": (
        lambda self, ops, sampling: None,
        (
            "method 'round': parameter 'draws' is missing; "
            "expected round(ops, sampling, draws), found round(ops, sampling)"
        ),
    ),
    "renamed": (lambda self, ops, sampling, rng: None, "parameter 'draws' is missing"),
    "swapped": (lambda self, sampling, ops, draws: None, "parameter 'ops' is not in its place"),
    "surplus": (
        lambda self, ops, sampling, draws, more: None,
        "parameter 'more' is not in the protocol and has no default",
    ),
    "unnameable": (
        lambda self, ops, sampling, draws, /: None,
        "parameter 'ops' cannot be passed by name",
    ),
    "by name only": (lambda self, ops, *, sampling, draws: None, "'sampling' is not in its place"),
}


@pytest.mark.parametrize("case", FAULTY)
def test_signatures_that_a_runtime_protocol_accepts(refusal, case) -> None:
    method, message = FAULTY[case]
    faulty = variant(round=method)
    if method is not None:
        assert isinstance(faulty(None, None), Sampler)
    assert message in refusal(sampler(faulty))
    assert refusal(sampler(faulty)).startswith("sampler 'x': Variant: ")


def with_default(self, ops, sampling, draws, more=None): ...
def anything(self, *args, **kwargs): ...
def static(ops, sampling, draws): ...


@functools.wraps(with_default)
def wrapped(*args): ...


@pytest.mark.parametrize("method", [with_default, anything, staticmethod(static), wrapped])
def test_signatures_that_suit(manifest, method) -> None:
    check_record(sampler(variant(round=method)), manifest)


def test_both_faulty_methods_are_told(refusal) -> None:
    message = refusal(sampler(variant(round=None, check=None)))
    assert "method 'check' is missing" in message
    assert "method 'round' is missing" in message


def test_a_module_without_forward_is_noticed(refusal) -> None:
    class Module(torch.nn.Module):
        def __init__(self, params, context): ...
        def new_cache(self, batch): ...

    record = Component("global_model", "x", Module, Keys, "")
    assert "method 'forward' is missing; expected forward(embeddings, cache)" in refusal(record)


def test_functions_are_checked_by_what_they_say_they_return(refusal, manifest) -> None:
    def says_nothing(params, context): ...
    def says_protocol(params, context) -> Sampler: ...
    def says_class(params, context) -> Faulty: ...
    def says_unknown(params, context) -> NoSuchName: ...  # noqa: F821

    for factory in (says_nothing, says_protocol, says_unknown):
        check_record(sampler(factory), manifest)
    assert "Faulty: method 'round' is missing" in refusal(sampler(says_class))


class Faulty:
    def check(self, sampling): ...


def test_instances_are_checked_with_their_attributes(plugins) -> None:
    class Half:
        denoises = False

        def new_cache(self, batch): ...

    entry = plugins.registry.lookup("decoder", "local")
    with pytest.raises(PluginError) as caught:
        plugins.registry.check_instance(entry, Half())
    assert str(caught.value) == (
        "decoder 'local' (blt-core): Half: method 'forward' is missing; expected "
        "forward(clean, blocks, latents, cache); attribute 'reads_byte_states' is missing"
    )


# -- names ---------------------------------------------------------------------------------------


@pytest.fixture
def complaint():
    def complaint(plugins, kind: str, name: str) -> str:
        with pytest.raises(PluginError) as caught:
            plugins.registry.lookup(kind, name)
        return str(caught.value)

    return complaint


@pytest.fixture
def policy(tmp_path, shipped):
    def policy(text: str):
        file = tmp_path / "registry.toml"
        file.write_text(f"schema = 1\n{text}")
        return load_manifest([shipped, file])

    return policy


@pytest.fixture
def rivals(fakes):
    """Two distributions with a sampler of the same name."""
    record = fakes.component("sampler", "tree", fakes.FakeSampler)
    return [(name, "trees", fakes.make_plugin(record)) for name in ("acme", "bush")]


def test_unknown_names_get_a_near_match_and_a_list(plugins, complaint) -> None:
    assert complaint(plugins, "sampler", "blt-vd") == (
        "no sampler named 'blt-vd'. Did you mean 'blt-dv'?\n"
        "  installed samplers: ar, blt-dv, speculative      list all: blt plugins"
    )
    assert complaint(plugins, "byte_scorer", "x").startswith("no byte scorer named 'x'.\n")
    assert "installed corpuses: none" in complaint(plugins, "corpus", "x")
    assert complaint(plugins, "samplr", "ar").startswith("no kind named 'samplr'. Did you mean")


def test_unknown_names_may_be_a_broken_plugins(load, fakes, complaint) -> None:
    class Broken:
        @hookimpl
        def blt_components(self):
            raise ImportError("no module named 'trees'")

    plugins = load(*fakes.COMPONENTS, extra=[("acme", "trees", Broken())])
    assert complaint(plugins, "sampler", "tree").endswith(
        "\n  plugin 'trees' (acme) is broken: ImportError: no module named 'trees'"
    )


def test_known_names_say_how_to_install_them(load, fakes, policy, complaint) -> None:
    known = policy('[components.sampler."acme/tree"]\ndistribution = "blt-acme"\n')
    plugins = load(*fakes.COMPONENTS, policy=known)
    assert complaint(plugins, "sampler", "acme/tree") == (
        "'acme/tree' is known, but its plugin is not installed.\n  fix: pip install blt-acme"
    )
    assert "Did you mean 'acme/tree'?" in complaint(plugins, "sampler", "acme-tree")


def test_known_names_of_a_broken_plugin_say_so(load, policy, complaint) -> None:
    known = policy('[components.sampler."acme/tree"]\ndistribution = "blt-acme"\n')
    plugins = load(extra=[("Blt_Acme", "trees", None)], policy=known)
    assert complaint(plugins, "sampler", "acme/tree") == (
        "'acme/tree' is known, but its plugin is broken.\n"
        "  plugin 'trees' (Blt_Acme) is broken: the entry point leads to None"
    )


def test_known_names_that_the_installed_version_lacks(load, policy, complaint) -> None:
    known = policy('[components.sampler.tree]\ndistribution = "pluggy"\n')
    message = complaint(load(policy=known), "sampler", "tree")
    assert message.startswith("'tree' is known, but pluggy 1.")
    assert "does not supply it.\n  fix: pip install pluggy --upgrade" in message


def test_blocked_names_say_who_blocks_them(load, fakes, policy, complaint, tmp_path) -> None:
    blocked = policy(
        """blocked = ["sampler/ar", "blt-acme"]
        [components.sampler.tree]
        distribution = "blt-acme"
        """
    )
    plugins = load(*fakes.COMPONENTS, policy=blocked)
    file = tmp_path / "registry.toml"
    assert complaint(plugins, "sampler", "ar").startswith(f"'ar' is blocked by {file}.")
    assert complaint(plugins, "sampler", "tree").startswith(
        f"'tree' is known, but its plugin (blt-acme) is blocked by {file}."
    )
    assert plugins.registry.names("sampler") == ["blt-dv", "speculative"]


def test_rival_names_are_an_error_only_when_used(load, fakes, rivals, complaint) -> None:
    plugins = load(*fakes.COMPONENTS, extra=rivals)
    assert not plugins.broken
    assert plugins.registry.lookup("sampler", "ar").record.name == "ar"
    assert complaint(plugins, "sampler", "tree") == (
        "'tree' is supplied by plugin 'trees' (acme) and plugin 'trees' (bush).\n"
        '  fix: in registry.toml, [prefer.sampler] "tree" = "acme"'
    )


def test_the_preferred_rival_wins(load, rivals, policy) -> None:
    plugins = load(extra=rivals, policy=policy('[prefer.sampler]\ntree = "Bush"\n'))
    assert plugins.registry.lookup("sampler", "tree").origin.distribution == "bush"


def test_the_status_of_an_entry_says_why_its_name_is_not_it(load, fakes, rivals, policy) -> None:
    def statuses(text: str) -> list[str]:
        plugins = load(*fakes.COMPONENTS[:1], extra=rivals, policy=policy(text))
        return [plugins.registry.status(entry) for entry in plugins.registry.entries]

    assert statuses("") == ["ok", "conflict with bush", "conflict with acme"]
    assert statuses('[prefer.sampler]\ntree = "bush"') == ["ok", "bush is preferred", "ok"]
    blocked = statuses('blocked = ["patcher/entropy", "sampler/tree"]')
    assert all(status.startswith("blocked by ") for status in blocked)


def test_a_preference_for_an_absent_rival_decides_nothing(load, rivals, policy, complaint) -> None:
    plugins = load(extra=rivals, policy=policy('[prefer.sampler]\ntree = "cork"\n'))
    assert complaint(plugins, "sampler", "tree").startswith("'tree' is supplied by")
    plugins = load(extra=rivals[:1], policy=policy('[prefer.sampler]\ntree = "cork"\n'))
    assert plugins.registry.lookup("sampler", "tree").origin.distribution == "acme"
