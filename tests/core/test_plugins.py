from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import attrs
import pytest
import structlog

from blt_core.component import BuildContext, Kind, Preset, nested
from blt_core.errors import ConfigError, PluginError
from blt_core.hookspecs import hookimpl
from blt_core.plugins import loading as plugins_module
from blt_core.plugins.entry_points import PLUGINS
from blt_core.plugins.loading import load_plugins
from blt_core.plugins.registry_file import load_manifest
from blt_core.wiring.config import Config
from blt_core.wiring.resolve import resolve


@attrs.frozen
class Settings:
    steps: int = 1


def broken(plugins) -> list[str]:
    return [str(plugin) for plugin in plugins.broken]


def test_each_component_knows_its_plugin(plugins) -> None:
    (plugin,) = plugins.loaded
    assert (plugin.origin.distribution, plugin.origin.entry_point) == ("blt-core", "fake")
    entry = plugins.registry.lookup("sampler", "ar")
    assert (entry.origin, entry.label) == (plugin.origin, "sampler 'ar' (blt-core)")


def test_the_default_plugins_are_loaded_once(monkeypatch) -> None:
    plugins_module._load_default.cache_clear()
    assert load_plugins() is load_plugins()
    plugins_module._load_default.cache_clear()


def test_a_misspelt_hook_breaks_its_plugin_alone(load, fakes) -> None:
    class Misspelt:
        @hookimpl
        def blt_component(self): ...

    plugins = load(
        fakes.component("sampler", "ar", fakes.FakeSampler), extra=[("x", "y", Misspelt())]
    )
    (message,) = broken(plugins)
    assert message.startswith(
        "plugin 'y' (x) is broken: no hook named 'blt_component'. Did you mean 'blt_components'?"
    )
    assert plugins.registry.names("sampler") == ["ar"]
    plugins.notify("blt_run_start", run=object())


def test_a_wrong_hook_argument_breaks_its_plugin(load) -> None:
    class Wrong:
        @hookimpl
        def blt_run_start(self, ran): ...

    (message,) = broken(load(extra=[("x", "y", Wrong())]))
    assert "blt_run_start" in message
    assert "'ran'" in message


def test_undecorated_hooks_are_noticed(load) -> None:
    class Forgetful:
        def blt_components(self):
            return []

    (message,) = broken(load(extra=[("x", "y", Forgetful())]))
    assert message.endswith("has no hook; mark one with @hookimpl, such as blt_components")


def test_an_error_in_a_hook_takes_the_whole_plugin_and_no_other(load, fakes) -> None:
    class Halfway:
        @hookimpl
        def blt_components(self):
            yield fakes.component("sampler", "half", fakes.FakeSampler)
            raise RuntimeError("out of ink")

        @hookimpl
        def blt_run_start(self, run):
            pytest.fail("a broken plugin's hooks must not be called")

    plugins = load(*fakes.COMPONENTS, extra=[("x", "half", Halfway())])
    assert broken(plugins) == ["plugin 'half' (x) is broken: RuntimeError: out of ink"]
    assert plugins.registry.names("sampler") == ["ar", "blt-dv", "speculative"]
    plugins.notify("blt_run_start", run=object())


def test_a_faulty_component_is_named(load, fakes) -> None:
    plugins = load(fakes.component("samplr", "x", fakes.FakeSampler))
    assert broken(plugins) == [
        (
            "plugin 'fake' (blt-core) is broken: samplr 'x': no kind named 'samplr'. "
            "Did you mean 'sampler'?"
        )
    ]


def test_one_plugin_cannot_supply_a_name_twice(load, fakes) -> None:
    twice = fakes.component("sampler", "ar", fakes.FakeSampler)
    assert broken(load(twice, twice)) == [
        "plugin 'fake' (blt-core) is broken: sampler 'ar' is supplied twice"
    ]


def test_two_distributions_may_use_one_entry_point_name(load, fakes) -> None:
    one = fakes.make_plugin(fakes.component("sampler", "one", fakes.FakeSampler))
    two = fakes.make_plugin(fakes.component("sampler", "two", fakes.FakeSampler))
    plugins = load(extra=[("a", "tree", one), ("b", "tree", two)])
    assert plugins.registry.names("sampler") == ["one", "two"]


def test_one_plugin_behind_two_entry_points_works_once(load, fakes) -> None:
    plugin = fakes.make_plugin(fakes.component("sampler", "ar", fakes.FakeSampler))
    plugins = load(
        extra=[("a", "x", plugin), ("b", "x", plugin), ("a", "x", plugin), ("c", "x", None)]
    )
    assert plugins.registry.names("sampler") == ["ar"]
    assert [str(b.cause) for b in plugins.broken] == [
        *2 * ["another entry point leads to the same plugin"],
        "the entry point leads to None",
    ]


def test_blocked_distributions_are_not_loaded(tmp_path, shipped, load, fakes) -> None:
    policy = tmp_path / "registry.toml"
    policy.write_text('schema = 1\nblocked = ["acme_blt"]\n')
    plugin = fakes.make_plugin(fakes.component("sampler", "tree", fakes.FakeSampler))
    plugins = load(extra=[("Acme-BLT", "x", plugin)], policy=load_manifest([shipped, policy]))
    assert not plugins.loaded
    assert not plugins.broken


HOOK = (
    "from blt_core.hookspecs import hookimpl\n@hookimpl\ndef blt_run_start(run): run.append({!r})\n"
)


def test_installed_plugins_are_loaded_in_a_fixed_order(install, manifest) -> None:
    for name, owner in {"good": "aardvark", "core": "BLT_core"}.items():
        install(owner, {PLUGINS: {"it": f"{name}_plugin"}}, {f"{name}_plugin": HOOK.format(name)})
    install("bad", {PLUGINS: {"it": "bad_plugin"}}, {"bad_plugin": "import no_such_module\n"})
    plugins = load_plugins(manifest)
    assert broken(plugins) == [
        "plugin 'it' (bad) is broken: ModuleNotFoundError: No module named 'no_such_module'",
    ]
    assert [(p.origin.distribution, p.version) for p in plugins.loaded] == [
        ("BLT_core", "1.0"),
        ("aardvark", "1.0"),
    ]
    run: list[str] = []
    plugins.notify("blt_run_start", run=run)
    assert run == ["core", "good"]


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import sys; sys.exit()", "SystemExit: "),
        ("raise GeneratorExit('done')", "GeneratorExit: done"),
        ("class Own(BaseException): ...\nraise Own('mine')", "Own: mine"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        (
            "class Mute(Exception):\n def __str__(self): raise ValueError\nraise Mute",
            "Mute: (its message cannot be shown: ValueError)",
        ),
    ],
)
def test_whatever_an_import_raises_breaks_its_plugin_alone(
    install, manifest, source, cause
) -> None:
    install("acme", {PLUGINS: {"it": "acme_bad"}}, {"acme_bad": source})
    install("good", {PLUGINS: {"it": "acme_good"}}, {"acme_good": HOOK.format("good")})
    plugins = load_plugins(manifest)
    [message] = broken(plugins)
    assert message.startswith(f"plugin 'it' (acme) is broken: {cause}")
    assert [p.origin.distribution for p in plugins.loaded] == ["good"]


def test_ctrl_c_during_an_import_interrupts_and_names_the_plugin(install, manifest) -> None:
    install("acme", {PLUGINS: {"it": "acme_slow"}}, {"acme_slow": "raise KeyboardInterrupt"})
    with pytest.raises(KeyboardInterrupt) as caught:
        load_plugins(manifest)
    assert str(caught.value) == "interrupted while plugin 'it' (acme) was imported"


def test_an_observer_that_exits_ends_nothing(load) -> None:
    class Leaver:
        @hookimpl
        def blt_run_start(self, run):
            raise SystemExit(0)

    plugins = load(extra=[("a", "x", Leaver())])
    plugins.notify("blt_run_start", run=1)
    assert broken(plugins) == ["plugin 'x' (a) is broken: SystemExit: 0"]


def test_warnings_of_plugins_go_to_stderr_in_programs_that_configure_no_log(load, capfd) -> None:
    class Clumsy:
        @hookimpl
        def blt_run_start(self, run):
            raise KeyError(run)

    structlog.reset_defaults()
    load(extra=[("a", "x", Clumsy())]).notify("blt_run_start", run=1)
    out, err = capfd.readouterr()
    assert out == ""
    assert "plugin 'x' (a) is broken: KeyError: 1" in err


# -- plugins of the index ------------------------------------------------------------------------

SUPPLIES = """
from tests.core.conftest import NoKeys, FakeSampler, component
from blt_core.hookspecs import hookimpl

@hookimpl
def blt_components():
    return [component("sampler", {name!r}, FakeSampler)]

@hookimpl
def blt_settings():
    return {{{name!r}: NoKeys}}
"""

NAMES = ("one", "two")


@pytest.fixture
def indexed(tmp_path, shipped, install):
    """A policy whose index names the installed plugins one and two; other names them not."""
    policy = tmp_path / "shipped.toml"
    text = shipped.read_text().split("# -- components")[0]
    for table in ("components.sampler", "settings"):
        text += f"[{table}]\n"
        text += "".join(f'{n} = {{ distribution = "acme", plugin = "{n}" }}\n' for n in NAMES)
    policy.write_text(text)
    modules = {name: f"acme_{name}" for name in NAMES}
    sources = {f"acme_{name}": SUPPLIES.format(name=name) for name in NAMES}
    install("acme", {PLUGINS: modules}, sources)
    install("other", {PLUGINS: {"more": "acme_more"}}, {"acme_more": SUPPLIES.format(name="more")})
    return load_manifest([policy])


def imported() -> set[str]:
    return {name.removeprefix("acme_") for name in sys.modules if name.startswith("acme_")}


def test_a_name_of_the_index_imports_its_plugin_alone(indexed) -> None:
    plugins = load_plugins(indexed)
    assert imported() == {"more"}
    assert plugins.registry.lookup("sampler", "one").origin.entry_point == "one"
    assert imported() == {"more", "one"}
    assert plugins.registry.names("sampler") == ["more", "one", "two"]
    assert [str(p.origin.entry_point) for p in plugins.loaded] == ["one", "two", "more"]


def test_tables_of_the_index_are_known_and_their_plugin_is_imported_for_them(indexed) -> None:
    plugins = load_plugins(indexed)
    assert set(plugins.settings) == {"one", "two", "more"}
    assert imported() == {"more"}
    assert plugins.settings["one"].__name__ == "NoKeys"
    assert imported() == {"more", "one"}


def test_a_config_is_checked_by_the_plugins_that_own_its_tables(indexed) -> None:
    plugins = load_plugins(indexed)
    assert plugins.check(Config.from_mapping({"schema": 1, "one": {}})) is None
    assert imported() == {"more", "one"}


def test_a_table_of_a_broken_plugin_says_so(indexed, tmp_path, problems) -> None:
    (tmp_path / "site" / "acme_one.py").write_text("import no_such_module\n")
    config = Config.from_mapping({"schema": 1, "one": {}}, "run.toml")
    [problem] = problems(resolve, config, load_plugins(indexed))
    assert problem.startswith(
        "run.toml: one: its plugin is broken.\n  plugin 'one' (acme) is broken"
    )


def test_a_conflict_with_a_plugin_of_the_index_is_one(indexed, fakes) -> None:
    rival = fakes.make_plugin(fakes.component("sampler", "one", fakes.FakeSampler))
    plugins = load_plugins(indexed, extra=[("bush", "x", rival)])
    with pytest.raises(PluginError, match=r"supplied by plugin 'one' \(acme\) and plugin 'x'"):
        plugins.registry.lookup("sampler", "one")


def test_no_plugin_can_take_a_table_or_module_of_the_index(indexed, install, fakes) -> None:
    install("copy", {PLUGINS: {"it": "acme_two"}}, {})
    thief = fakes.make_plugin(settings={"one": Settings})
    plugins = load_plugins(indexed, extra=[("bush", "thief", thief)])
    assert broken(plugins) == [
        "plugin 'it' (copy) is broken: another entry point leads to the same plugin",
        "plugin 'thief' (bush) is broken: blt_settings: the table [one] has an owner already",
    ]
    assert plugins.registry.names("sampler") == ["more", "one", "two"]


def test_threads_that_look_up_at_once_import_once(indexed, tmp_path) -> None:
    source = (tmp_path / "site" / "acme_one.py").read_text()
    (tmp_path / "site" / "acme_one.py").write_text(f"import time; time.sleep(0.1)\n{source}")
    plugins = load_plugins(indexed)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: plugins.registry.lookup("sampler", "one"), range(8)))
    assert len({id(entry.record) for entry in found}) == 1


# -- kinds ---------------------------------------------------------------------------------------


class Pet(Protocol):
    def speak(self) -> str: ...


class Dog:
    def __init__(self, params, context): ...
    def speak(self):
        return "wau"


class Owner:
    def __init__(self, params, context):
        self.pet = params.pet

    def speak(self):
        return self.pet.speak()


@attrs.frozen
class OwnerParams:
    pet: Any = nested("pet", default="dog")


PETS = Kind(f"{__name__}:Pet", "an animal", root=True)


class Declares:
    def __init__(self, **kinds: object) -> None:
        self.kinds = kinds

    @hookimpl
    def blt_kinds(self):
        return self.kinds


@pytest.fixture
def pet_plugins(fakes):
    supplies = fakes.make_plugin(
        fakes.component("pet", "dog", Dog), fakes.component("pet", "owner", Owner, OwnerParams)
    )
    return [("zoo", "kinds", Declares(pet=PETS)), ("acme", "dogs", supplies)]


@pytest.mark.parametrize("order", [1, -1])
def test_a_plugin_declares_a_kind_and_others_supply_and_nest_it(load, pet_plugins, order) -> None:
    plugins = load(extra=pet_plugins[::order])
    assert plugins.broken == ()
    plan = resolve(Config.from_mapping({"schema": 1, "pet": {"use": "owner"}}), plugins)
    assert plan.build("pet", BuildContext()).speak() == "wau"
    assert "pet" in plugins.manifest.roots


def test_components_of_a_kind_are_held_to_its_protocol(load, pet_plugins, fakes) -> None:
    mute = fakes.make_plugin(fakes.component("pet", "mute", fakes.FakeSampler))
    plugins = load(extra=[*pet_plugins, ("acme", "mute", mute)])
    assert "FakeSampler: method 'speak' is missing" in broken(plugins)[0]


def test_a_broken_plugin_takes_its_kinds_with_it(load, pet_plugins, fakes) -> None:
    class Halfway(Declares):
        @hookimpl
        def blt_components(self):
            return [fakes.component("sampler", "BAD", fakes.FakeSampler)]

    plugins = load(extra=[("zoo", "kinds", Halfway(pet=PETS)), pet_plugins[1]])
    first, second = broken(plugins)
    assert "a name is lower-case" in first
    assert "pet 'dog': no kind named 'pet'" in second
    assert "pet" not in plugins.manifest.kinds


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"sampler": PETS}, "blt_kinds: there is a kind 'sampler' already"),
        ({"run": PETS}, "blt_kinds: the table [run] has an owner already"),
        ({"train": PETS}, "blt_kinds: the table [train] has an owner already"),
        ({"Pet": PETS}, "blt_kinds: 'Pet': a name is lower-case, as in 'stop_rule'"),
        ({"pet": "x:Y"}, "blt_kinds: 'pet': expected a Kind, got 'x:Y'"),
        (
            {"pet": Kind("no_such_module:Pet", "")},
            "protocol 'no_such_module:Pet' cannot be imported: No module named 'no_such_module'",
        ),
    ],
)
def test_kinds_that_cannot_be_declared(load, fakes, kinds, message) -> None:
    trainer = fakes.make_plugin(settings={"train": Settings})
    plugins = load(extra=[("a", "trainer", trainer), ("zoo", "z", Declares(**kinds))])
    # The owner of a table and the kind of that name may come in any order: the kind yields.
    assert broken(plugins) == [f"plugin 'z' (zoo) is broken: {message}"]
    assert set(plugins.settings) == {"train"}


def test_the_first_plugin_keeps_a_kind(load) -> None:
    plugins = load(extra=[("a", "x", Declares(pet=PETS)), ("b", "y", Declares(pet=PETS))])
    assert broken(plugins) == ["plugin 'y' (b) is broken: blt_kinds: there is a kind 'pet' already"]


def test_files_may_name_the_kinds_of_plugins_and_no_others(
    tmp_path, shipped, load, pet_plugins, problems
) -> None:
    file = tmp_path / "registry.toml"
    file.write_text('schema = 1\n[prefer.pet]\ndog = "acme"\n[components.pte]\n')
    policy = load_manifest([shipped, file])
    [problem] = problems(load, extra=pet_plugins, policy=policy)
    assert problem.startswith(f"{file}: components.pte: no kind named 'pte'. Did you mean 'pet'?")


def test_plugins_may_own_config_tables(load, fakes) -> None:
    owner = fakes.make_plugin(settings={"train": Settings})
    thief = fakes.make_plugin(settings={"train": Settings})
    plugins = load(extra=[("a", "owner", owner), ("b", "thief", thief)])
    assert plugins.settings == {"train": Settings}
    assert broken(plugins) == [
        "plugin 'thief' (b) is broken: blt_settings: the table [train] has an owner already"
    ]


@pytest.mark.parametrize("name", ["run", "schema", "sampler", "drafter"])
def test_no_plugin_can_take_a_table_of_the_core(load, fakes, name) -> None:
    plugins = load(extra=[("a", "thief", fakes.make_plugin(settings={name: Settings}))])
    assert f"[{name}] has an owner already" in broken(plugins)[0]


def test_settings_must_be_spellable(load, fakes) -> None:
    plugins = load(extra=[("a", "b", fakes.make_plugin(settings={"train": int}))])
    assert "blt_settings: params must be an attrs class, not <class 'int'>" in broken(plugins)[0]


def test_presets_are_components_like_any(load, fakes) -> None:
    preset = Preset("sampler", "mine", fakes.NoKeys, lambda _: {"use": "ar"}, "mine")
    assert load(preset).registry.lookup("sampler", "mine").record is preset


# -- checks --------------------------------------------------------------------------------------


class Checks:
    """A plugin whose commands run configs with a table of this name."""

    def __init__(self, table: str, found: object) -> None:
        self.table, self.found = table, found

    @hookimpl
    def blt_check(self, config, plugins):
        if self.table not in config.tables:
            return None
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_a_config_is_checked_by_the_plugin_that_runs_it(load) -> None:
    plugins = load(
        extra=[
            ("a", "broken", Checks("grow", RuntimeError("oh"))),
            ("b", "grower", Checks("grow", {"grow": {"speed": 1}})),
            ("c", "cutter", Checks("cut", ConfigError([]))),
        ]
    )
    assert plugins.check(Config.from_mapping({"schema": 1})) is None
    assert plugins.broken == ()
    assert plugins.check(Config.from_mapping({"grow": {}})) == {"grow": {"speed": 1}}
    assert broken(plugins) == ["plugin 'broken' (a) is broken: RuntimeError: oh"]
    with pytest.raises(ConfigError):
        plugins.check(Config.from_mapping({"cut": {}}))


# -- run hooks -----------------------------------------------------------------------------------


def test_an_observer_that_raises_ends_nothing_and_is_logged_once(load) -> None:
    class Clumsy:
        @hookimpl
        def blt_run_step(self, step):
            raise KeyError(step)

    class Watchful:
        def __init__(self):
            self.steps = []

        @hookimpl
        def blt_run_step(self, run, step):
            self.steps.append((run, step))

    watchful = Watchful()
    plugins = load(extra=[("a", "x", Clumsy()), ("b", "y", watchful)])
    with structlog.testing.capture_logs() as logs:
        plugins.notify("blt_run_start", run=1)
        plugins.notify("blt_run_step", run=1, step=2)
        plugins.notify("blt_run_step", run=1, step=3)
    assert watchful.steps == [(1, 2), (1, 3)]
    assert logs == [
        {
            "event": "plugin 'x' (a) is broken: KeyError: 2; the run goes on",
            "hook": "blt_run_step",
            "log_level": "warning",
        }
    ]
    assert broken(plugins) == ["plugin 'x' (a) is broken: KeyError: 3"]
