"""Finds, loads and checks plugins.

Plugins are entry points of the group ``blt_core``: modules (or objects) with hooks. A plugin is
taken whole or not at all. One that cannot be loaded is remembered with its cause, which is shown
when something that it may supply is named; the others work on.

Why not ``load_setuptools_entrypoints``: it skips a second entry point of the same name silently,
and one failing import stops the rest.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib import metadata
from typing import TYPE_CHECKING

import attrs
import pluggy

from blt_core import hookspecs
from blt_core._structure import UnsupportedType, check_params
from blt_core.component import Component, Preset
from blt_core.errors import BltError, PluginError, near_match
from blt_core.log import logger
from blt_core.manifest import Manifest, canonical, load_manifest
from blt_core.registry import BrokenPlugin, Entry, Origin, Registry, check_record

if TYPE_CHECKING:
    import typer

GROUP = "blt_core"
#: The distribution whose plugins come first: no other can take the name of its command or table.
CORE = "blt-core"
#: Top-level keys of a config that belong to the core.
RESERVED = ("schema", "run", "model")

#: A plugin given by hand: distribution, entry point name, module or object with hooks.
Extra = tuple[str, str, object]


@attrs.frozen
class LoadedPlugin:
    """A plugin that works: a module or object with hooks, its origin, and what it supplies.

    ``settings``: config tables of its own, by name, each with the attrs class of its keys.
    ``hook``: calls its hooks, and those of no other plugin.
    """

    plugin: object = attrs.field(eq=False, repr=False)
    origin: Origin
    version: str
    components: tuple[Component | Preset, ...]
    settings: Mapping[str, type]
    hook: pluggy.HookRelay = attrs.field(eq=False, repr=False)


@attrs.frozen
class Plugins:
    """Everything that is loaded. Plugins whose hooks fail later on keep their components."""

    registry: Registry
    loaded: tuple[LoadedPlugin, ...]
    _failed: dict[tuple[Origin, str], BrokenPlugin] = attrs.field(
        factory=dict, init=False, eq=False, repr=False
    )

    @property
    def broken(self) -> tuple[BrokenPlugin, ...]:
        """Plugins that could not be loaded, and those of which a hook has failed since."""
        return (*self.registry.broken, *self._failed.values())

    @property
    def settings(self) -> Mapping[str, type]:
        """Config tables of plugins, each with the attrs class of its keys."""
        return {name: cls for plugin in self.loaded for name, cls in plugin.settings.items()}

    @property
    def manifest(self) -> Manifest:
        """The policy in force."""
        return self.registry.manifest

    def add_commands(self, app: typer.Typer) -> None:
        """Add the commands of all plugins to ``app``.

        A plugin that raises, or takes a name that is taken, adds none and counts as broken.
        """
        taken = _command_names(app)
        for plugin in self.loaded:
            try:
                own = _own_commands(plugin, taken)
            except (Exception, SystemExit) as error:  # noqa: BLE001, PERF203 -- the others go on
                broken = BrokenPlugin(plugin.origin, error)
                self._failed[plugin.origin, "blt_commands"] = broken
            else:
                taken |= _command_names(own)
                app.registered_commands += own.registered_commands
                app.registered_groups += own.registered_groups

    def check(self, config: object) -> Mapping[str, object] | None:
        """The expanded tables of a config that the commands of a plugin run; None if none does.

        Raises ConfigError with all problems of such a config. A plugin that raises anything else
        is logged, counts as broken, and the others are asked.
        """
        for plugin in self.loaded:
            try:
                for tables in plugin.hook.blt_check(config=config, plugins=self):
                    return dict(tables)
            except BltError:  # noqa: PERF203 -- the others go on
                raise
            except Exception as error:  # noqa: BLE001
                broken = BrokenPlugin(plugin.origin, error)
                self._failed[plugin.origin, "blt_check"] = broken
                logger().warning(f"{broken}; it is not asked", hook="blt_check")
        return None

    def notify(self, hook: str, **arguments: object) -> None:
        """Call a run hook of all plugins. What one raises is logged, once, and ends nothing."""
        for plugin in self.loaded:
            try:
                getattr(plugin.hook, hook)(**arguments)
            except Exception as error:  # noqa: BLE001, PERF203 -- an observer must not end a run
                broken = BrokenPlugin(plugin.origin, error)
                if (plugin.origin, hook) not in self._failed:
                    logger().warning(f"{broken}; the run goes on", hook=hook)
                self._failed[plugin.origin, hook] = broken


def _own_commands(plugin: LoadedPlugin, taken: Collection[str]) -> typer.Typer:
    """A plugin's commands, in an app of their own: what is wrong with them stays in it."""
    import typer

    app = typer.Typer()
    plugin.hook.blt_commands(app=app)
    for name in sorted(_command_names(app)):
        if name in taken:
            raise PluginError(f"blt_commands: there is a command {name!r} already")
    return app


def _command_names(app: typer.Typer) -> set[str]:
    """The names of an app's commands; typer raises if the signature of one is not for it."""
    from typer.main import get_group

    return set(get_group(app).commands)


def load_plugins(
    manifest: Manifest | None = None, *, extra: Iterable[Extra] = (), installed: bool = True
) -> Plugins:
    """Load the installed plugins, and ``extra`` ones; without arguments, once a process.

    Never raises for a broken plugin; raises ConfigError if a registry.toml is malformed.
    """
    extra = tuple(extra)
    if manifest is None and not extra and installed:
        return _load_default()
    return _load(load_manifest() if manifest is None else manifest, extra, installed=installed)


@functools.cache
def _load_default() -> Plugins:
    return _load(load_manifest(), (), installed=True)


def _load(manifest: Manifest, extra: tuple[Extra, ...], *, installed: bool) -> Plugins:
    assembly = _Assembly(manifest)
    for point in _entry_points() if installed else ():
        distribution, version = _supplier(point)
        assembly.add(Origin(distribution, point.name), version, point.load)
    for distribution, name, plugin in extra:
        assembly.add(Origin(distribution, name), "", functools.partial(_given, plugin))
    entries = tuple(
        Entry(record, plugin.origin) for plugin in assembly.loaded for record in plugin.components
    )
    registry = Registry(manifest, entries, tuple(assembly.broken))
    return Plugins(registry, tuple(assembly.loaded))


def _given(plugin: object) -> object:
    return plugin


def _entry_points() -> list[metadata.EntryPoint]:
    # Sorted: the order of sys.path must not decide which hook is called first.
    def order(point: metadata.EntryPoint) -> tuple[bool, tuple[str, str], str]:
        distribution, version = _supplier(point)
        return canonical(distribution) != CORE, (distribution, version), point.name

    return sorted(metadata.entry_points(group=GROUP), key=order)


def _supplier(point: metadata.EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("unknown", "")


class _Assembly:
    """Plugins on their way into a registry."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.loaded: list[LoadedPlugin] = []
        self.broken: list[BrokenPlugin] = []

    def add(self, origin: Origin, version: str, load: Callable[[], object]) -> None:
        """Load one plugin, or remember why it cannot be."""
        if self.manifest.blocks_distribution(origin.distribution):
            return
        try:
            plugin = load()
            hook = self._hook(plugin)
            components = tuple(self._components(hook))
            settings = dict(self._settings(hook))
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- the other plugins work on
            self.broken.append(BrokenPlugin(origin, error))
        else:
            self.loaded.append(LoadedPlugin(plugin, origin, version, components, settings, hook))

    def _hook(self, plugin: object) -> pluggy.HookRelay:
        """What calls the hooks of one plugin, all of which must exist."""
        if plugin is None:
            raise PluginError("the entry point leads to None")
        if any(loaded.plugin is plugin for loaded in self.loaded):
            raise PluginError("another entry point leads to the same plugin")
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        manager.register(plugin)
        callers = manager.get_hookcallers(plugin) or []
        if not callers:
            raise PluginError("has no hook; mark one with @hookimpl, such as blt_components")
        # pluggy's check_pending stops at the first plugin, and knows no near match.
        hooks = [hook for hook in vars(hookspecs) if hook.startswith("blt_")]
        for caller in callers:
            if not caller.has_spec():
                text = f"no hook named {caller.name!r}.{near_match(caller.name, hooks)}"
                raise PluginError(text, (f"hooks: {', '.join(hooks)}",))
        return manager.hook

    def _components(self, hook: pluggy.HookRelay) -> Iterator[Component | Preset]:
        """The checked components of one plugin."""
        seen: set[tuple[str, str]] = set()
        for record in itertools.chain(*hook.blt_components()):
            check_record(record, self.manifest)
            if (record.kind, record.name) in seen:
                raise PluginError(f"{record.kind} {record.name!r} is supplied twice")
            seen.add((record.kind, record.name))
            yield record

    def _settings(self, hook: pluggy.HookRelay) -> Iterator[tuple[str, type]]:
        """The checked settings tables of one plugin."""
        taken = {*RESERVED, *self.manifest.kinds, *(n for p in self.loaded for n in p.settings)}
        for tables in hook.blt_settings():
            for name, cls in tables.items():
                if name in taken:
                    raise PluginError(f"blt_settings: the table [{name}] has an owner already")
                try:
                    check_params(cls)
                except UnsupportedType as error:
                    raise PluginError(f"blt_settings: {error}") from error
                yield name, cls
