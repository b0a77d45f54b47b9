from __future__ import annotations

from importlib import metadata

import attrs
import pytest
import structlog
import typer

from blt_core import plugins as plugins_module
from blt_core.component import Preset
from blt_core.config import Config
from blt_core.errors import ConfigError
from blt_core.hookspecs import hookimpl
from blt_core.manifest import load_manifest
from blt_core.plugins import GROUP, load_plugins


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


def test_installed_entry_points_are_loaded_in_a_fixed_order(
    monkeypatch, tmp_path, manifest, fakes
) -> None:
    (tmp_path / "good_plugin.py").write_text(
        "from blt_core.hookspecs import hookimpl\n"
        "@hookimpl\ndef blt_run_start(run): run.append('good')\n"
    )
    (tmp_path / "bad_plugin.py").write_text("import no_such_module\n")
    (tmp_path / "exit_plugin.py").write_text("raise SystemExit(3)\n")
    good = (tmp_path / "good_plugin.py").read_text()
    (tmp_path / "core_plugin.py").write_text(good.replace("'good'", "'core'"))
    owners = {"good": "aardvark", "core": "BLT_core"}
    for name in ("good", "bad", "exit", "core"):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {owners.get(name, name)}\nVersion: 1.0\n"
        )
        (info / "entry_points.txt").write_text(f"[{GROUP}]\nit = {name}_plugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    points = [p for d in metadata.distributions(path=[str(tmp_path)]) for p in d.entry_points]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)
    plugins = load_plugins(manifest)
    assert broken(plugins) == [
        "plugin 'it' (bad) is broken: ModuleNotFoundError: No module named 'no_such_module'",
        "plugin 'it' (exit) is broken: SystemExit: 3",
    ]
    assert [(p.origin.distribution, p.version) for p in plugins.loaded] == [
        ("BLT_core", "1.0"),
        ("aardvark", "1.0"),
    ]
    run: list[str] = []
    plugins.notify("blt_run_start", run=run)
    assert run == ["core", "good"]


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


# -- commands ------------------------------------------------------------------------------------


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


class Commands:
    """A plugin that adds commands by these names."""

    def __init__(self, *names: str) -> None:
        self.names = names

    @hookimpl
    def blt_commands(self, app):
        for name in self.names:
            app.command(name)(lambda: None)


@pytest.fixture
def core_app():
    app = typer.Typer()

    @app.command()
    def check(): ...

    @app.callback()
    def common(): ...

    return app


def command_names(app) -> list[str]:
    return list(typer.main.get_group(app).commands)


def test_commands_of_plugins_join_those_of_the_core(load, core_app) -> None:
    class Group:
        @hookimpl
        def blt_commands(self, app):
            group = typer.Typer()
            group.command("plant")(lambda: None)
            app.add_typer(group, name="trees")

    plugins = load(extra=[("a", "x", Commands("grow", "cut")), ("b", "y", Group())])
    plugins.add_commands(core_app)
    assert command_names(core_app) == ["check", "grow", "cut", "trees"]
    assert not plugins.broken


def test_a_plugin_whose_commands_fail_breaks_alone_and_keeps_its_components(
    load, fakes, core_app
) -> None:
    class Halfway(Commands):
        @hookimpl
        def blt_components(self):
            return [fakes.component("sampler", "half", fakes.FakeSampler)]

        @hookimpl
        def blt_commands(self, app):
            app.command("half")(lambda: None)
            raise RuntimeError("out of ink")

    class Unparsable:
        @hookimpl
        def blt_commands(self, app):
            @app.command()
            def draw(colour: int | str): ...

    extra = [("a", "x", Halfway()), ("b", "y", Unparsable()), ("c", "z", Commands("grow"))]
    plugins = load(extra=extra)
    plugins.add_commands(typer.Typer())
    plugins.add_commands(core_app)
    half, unparsable = broken(plugins)
    assert half == "plugin 'x' (a) is broken: RuntimeError: out of ink"
    assert unparsable.startswith("plugin 'y' (b) is broken: AssertionError: Typer")
    assert command_names(core_app) == ["check", "grow"]
    assert plugins.registry.names("sampler") == ["half"]


def test_the_first_owner_keeps_a_commands_name(load, core_app) -> None:
    extra = [
        ("a", "x", Commands("grow")),
        ("b", "y", Commands("shrink", "check")),
        ("c", "z", Commands("grow")),
    ]
    plugins = load(extra=extra)
    plugins.add_commands(core_app)
    assert command_names(core_app) == ["check", "grow"]
    assert broken(plugins) == [
        "plugin 'y' (b) is broken: blt_commands: there is a command 'check' already",
        "plugin 'z' (c) is broken: blt_commands: there is a command 'grow' already",
    ]


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
