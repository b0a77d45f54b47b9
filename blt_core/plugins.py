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
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any

import attrs
import pluggy

from blt_core import hookspecs
from blt_core._structure import UnsupportedType, check_params
from blt_core.component import Component, Preset
from blt_core.errors import PluginError, near_match
from blt_core.manifest import Manifest, load_manifest
from blt_core.registry import BrokenPlugin, Entry, Origin, Registry, check_record

GROUP = "blt_core"
#: Top-level keys of a config that belong to the core.
RESERVED = ("schema", "run", "model")

#: A plugin given by hand: distribution, entry point name, module or object with hooks.
Extra = tuple[str, str, object]


@attrs.frozen
class LoadedPlugin:
    """A plugin that works: where it comes from and what it supplies.

    ``settings``: config tables of its own, by name, each with the attrs class of its keys.
    """

    origin: Origin
    version: str
    components: tuple[Component | Preset, ...]
    settings: Mapping[str, type]


@attrs.frozen
class Plugins:
    """Everything that is loaded. ``hook`` calls the commands and run hooks of all plugins."""

    registry: Registry
    loaded: tuple[LoadedPlugin, ...]
    hook: pluggy.HookRelay = attrs.field(repr=False)

    @property
    def broken(self) -> tuple[BrokenPlugin, ...]:
        """Plugins that could not be loaded."""
        return self.registry.broken

    @property
    def settings(self) -> Mapping[str, type]:
        """Config tables of plugins, each with the attrs class of its keys."""
        return {name: cls for plugin in self.loaded for name, cls in plugin.settings.items()}

    @property
    def manifest(self) -> Manifest:
        """The policy in force."""
        return self.registry.manifest


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
    return Plugins(registry, tuple(assembly.loaded), assembly.manager.hook)


def _given(plugin: object) -> object:
    return plugin


def _entry_points() -> list[metadata.EntryPoint]:
    # Sorted: the order of sys.path must not decide which hook is called first.
    return sorted(metadata.entry_points(group=GROUP), key=lambda p: (_supplier(p), p.name))


def _supplier(point: metadata.EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("unknown", "")


class _Assembly:
    """Plugins on their way into a registry."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.loaded: list[LoadedPlugin] = []
        self.broken: list[BrokenPlugin] = []

    def add(self, origin: Origin, version: str, load: Callable[[], object]) -> None:
        """Load one plugin, or remember why it cannot be."""
        if self.manifest.blocks_distribution(origin.distribution):
            return
        # One distribution may use the name of an entry point twice.
        count = len(self.loaded) + len(self.broken)
        name = f"{origin.distribution}:{origin.entry_point}#{count}"
        try:
            plugin = load()
            self._register(plugin, name)
            components = tuple(self._components(plugin))
            settings = dict(self._settings(plugin))
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- the other plugins work on
            if self.manager.has_plugin(name):
                self.manager.unregister(name=name)
            self.broken.append(BrokenPlugin(origin, error))
        else:
            self.loaded.append(LoadedPlugin(origin, version, components, settings))

    def _register(self, plugin: object, name: str) -> None:
        """Register a plugin's hooks, all of which must exist."""
        if plugin is None:
            raise PluginError("the entry point leads to None")
        if plugin in self.manager.get_plugins():
            raise PluginError("another entry point leads to the same plugin")
        self.manager.register(plugin, name)
        callers = self.manager.get_hookcallers(plugin) or []
        if not callers:
            raise PluginError("has no hook; mark one with @hookimpl, such as blt_components")
        # pluggy's check_pending stops at the first plugin, and knows no near match.
        hooks = [hook for hook in vars(hookspecs) if hook.startswith("blt_")]
        for caller in callers:
            if not caller.has_spec():
                text = f"no hook named {caller.name!r}.{near_match(caller.name, hooks)}"
                raise PluginError(text, (f"hooks: {', '.join(hooks)}",))

    def _components(self, plugin: object) -> Iterator[Component | Preset]:
        """The checked components of one registered plugin."""
        seen: set[tuple[str, str]] = set()
        for record in itertools.chain(*self._call("blt_components", plugin)):
            check_record(record, self.manifest)
            if (record.kind, record.name) in seen:
                raise PluginError(f"{record.kind} {record.name!r} is supplied twice")
            seen.add((record.kind, record.name))
            yield record

    def _settings(self, plugin: object) -> Iterator[tuple[str, type]]:
        """The checked settings tables of one registered plugin."""
        taken = {*RESERVED, *self.manifest.kinds, *(n for p in self.loaded for n in p.settings)}
        for tables in self._call("blt_settings", plugin):
            for name, cls in tables.items():
                if name in taken:
                    raise PluginError(f"blt_settings: the table [{name}] has an owner already")
                try:
                    check_params(cls)
                except UnsupportedType as error:
                    raise PluginError(f"blt_settings: {error}") from error
                yield name, cls

    def _call(self, hook: str, plugin: object) -> list[Any]:
        """What a hook of one plugin returns."""
        others = [other for other in self.manager.get_plugins() if other is not plugin]
        results: list[Any] = self.manager.subset_hook_caller(hook, others)()
        return results
