"""Imports plugins, checks what they supply, and keeps them.

A plugin is taken whole or not at all. One that cannot be loaded is remembered with its cause; the
others work on. Those that the shipped index names are imported when something of theirs is wanted,
the others at once: only an import tells what they supply. (An index that plugins write into their
own metadata would be a second place where components are named, and could disagree with the first.)

Why not ``load_setuptools_entrypoints``: it skips a second entry point of the same name silently,
and one failing import stops the rest.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import attrs
import pluggy

from blt_core import hookspecs
from blt_core.component import Component, Kind, Preset
from blt_core.errors import PluginError, near_match
from blt_core.plugins.entry_points import BrokenPlugin, Origin, attempt, canonical
from blt_core.plugins.registry import Entry, check_record
from blt_core.plugins.registry_file import Manifest, Supplier
from blt_core.tables.structure import UnsupportedType, check_params

#: Top-level keys of a config that belong to the core.
RESERVED = frozenset({"schema", "run", "model"})

_KIND_NAME = re.compile(r"[a-z][a-z0-9_]*")


@attrs.frozen
class Candidate:
    """A plugin that is not loaded yet. ``module``: where its entry point leads, if to a module."""

    origin: Origin
    version: str
    load: Callable[[], object]
    module: str | None = None

    @property
    def supplier(self) -> Supplier:
        """How the index would name it."""
        return Supplier(canonical(self.origin.distribution), self.origin.entry_point)


@attrs.frozen
class LoadedPlugin:
    """A plugin that works: a module or object with hooks, its origin, and what it supplies.

    ``settings``: config tables of its own, by name, each with the attrs class of its keys.
    ``hook``: calls its hooks, and those of no other plugin.
    """

    plugin: object = attrs.field(eq=False, repr=False)
    origin: Origin
    version: str
    kinds: Mapping[str, Kind]
    components: tuple[Component | Preset, ...]
    settings: Mapping[str, type]
    hook: pluggy.HookRelay = attrs.field(eq=False, repr=False)
    entries: tuple[Entry, ...] = attrs.field(init=False, eq=False, repr=False)

    @entries.default
    def _entries(self) -> tuple[Entry, ...]:
        return tuple(Entry(record, self.origin) for record in self.components)


class Shelf:
    """The plugins of a process, in a fixed order; safe to use from several threads."""

    def __init__(
        self,
        manifest: Manifest,
        candidates: Iterable[Candidate],
        unreadable: Sequence[BrokenPlugin] = (),
    ) -> None:
        """Load the plugins that are not in the index; ConfigError if a file names no kind."""

        def allowed(each: Candidate | BrokenPlugin) -> bool:
            return manifest.blocks_distribution(each.origin.distribution) is None

        self._candidates = [each for each in candidates if allowed(each)]
        self._unreadable = tuple(each for each in unreadable if allowed(each))
        self._results: dict[int, LoadedPlugin | BrokenPlugin] = {}
        self._lock = threading.RLock()
        known = manifest.index.suppliers
        self._later: dict[Supplier, int] = {}
        for slot, each in enumerate(self._candidates):
            if each.module is not None and each.supplier in known:
                self._later.setdefault(each.supplier, slot)
        self.manifest = manifest
        later = set(self._later.values())
        self._load_now([slot for slot in range(len(self._candidates)) if slot not in later])
        self.manifest.check_kinds()

    # -- what is on it ---------------------------------------------------------------------------

    def loaded(self) -> tuple[LoadedPlugin, ...]:
        """The plugins that have been imported so far."""
        with self._lock:
            results = [self._results[slot] for slot in sorted(self._results)]
        return tuple(result for result in results if isinstance(result, LoadedPlugin))

    def load_all(self) -> tuple[LoadedPlugin, ...]:
        """All plugins that work."""
        self._load_later(self._later)
        return self.loaded()

    def broken(self) -> tuple[BrokenPlugin, ...]:
        """All plugins that do not, and distributions that cannot be read."""
        self._load_later(self._later)
        with self._lock:
            results = [self._results[slot] for slot in sorted(self._results)]
        return (*self._unreadable, *(each for each in results if isinstance(each, BrokenPlugin)))

    def entries(self, kind: str | None = None, name: str | None = None) -> Sequence[Entry]:
        """The components of the plugins that are loaded, at least those of a kind, or of a name."""
        index = self.manifest.index
        self._load_later(self._later if kind is None else index.suppliers_of(kind, name))
        return [entry for plugin in self.loaded() for entry in plugin.entries]

    def tables(self) -> dict[str, Supplier | type]:
        """Config tables of plugins: the class of a table's keys, or the plugin that has it."""
        indexed = self.manifest.index.tables.items()
        later = {name: supplier for name, supplier in indexed if supplier in self._later}
        return {**later, **{n: cls for each in self.loaded() for n, cls in each.settings.items()}}

    def table(self, name: str) -> type:
        """The class of a table's keys; KeyError if there is none, PluginError if it is broken."""
        found = self.tables()[name]
        if isinstance(found, Supplier):
            self._load_later([found])
            result = self._results[self._later[found]]
            if isinstance(result, BrokenPlugin):
                raise PluginError("its plugin is broken.", (str(result),))
            if name not in result.settings:
                raise PluginError(f"{result.origin} does not supply this table")
            found = result.settings[name]
        return found

    def load_tables(self, names: Collection[str]) -> tuple[LoadedPlugin, ...]:
        """The plugins that are loaded, at least those that have one of these tables."""
        tables = self.manifest.index.tables
        self._load_later([tables[name] for name in names if name in tables])
        return self.loaded()

    # -- loading ---------------------------------------------------------------------------------

    def _load_later(self, suppliers: Iterable[Supplier]) -> None:
        """Load plugins of the index, unless that has been tried."""
        with self._lock:
            for supplier in suppliers:
                slot = self._later.get(supplier)
                if slot is not None and slot not in self._results:
                    self._results[slot] = self._load_one(self._candidates[slot])

    def _load_one(self, candidate: Candidate) -> LoadedPlugin | BrokenPlugin:
        plugin = attempt(candidate.origin, functools.partial(_ask, candidate, self.loaded()))
        if isinstance(plugin, BrokenPlugin):
            return plugin
        own = {n for n, s in self.manifest.index.tables.items() if s == candidate.supplier}
        taken = self.tables().keys() - own
        return attempt(plugin.origin, functools.partial(_check, plugin, self.manifest, taken))

    def _load_now(self, slots: Iterable[int]) -> None:
        asked: dict[int, LoadedPlugin] = {}
        later = [self._candidates[slot].module for slot in self._later.values()]
        for slot in slots:
            candidate = self._candidates[slot]
            ask = functools.partial(_ask, candidate, tuple(asked.values()), later)
            plugin = attempt(candidate.origin, ask)
            if isinstance(plugin, BrokenPlugin):
                self._results[slot] = plugin
            else:
                asked[slot] = plugin
        # A kind may be of one plugin and its components of others, in any order. One that turns out
        # broken takes its kinds with it, and with them what others supply of those.
        while asked:
            failed = self._check_together(asked)
            self._results |= failed
            declared = any(asked[slot].kinds for slot in failed)
            asked = {slot: plugin for slot, plugin in asked.items() if slot not in failed}
            if not declared:
                break
        self._results |= asked
        self.manifest = functools.reduce(
            lambda manifest, plugin: manifest.with_kinds(plugin.kinds),
            asked.values(),
            self.manifest,
        )

    def _check_together(self, asked: Mapping[int, LoadedPlugin]) -> dict[int, BrokenPlugin]:
        """Those of some plugins that are broken, given the kinds of all."""
        manifest, taken = self.manifest, set(self.tables())
        failed: dict[int, BrokenPlugin] = {}
        tables = taken.union(*(plugin.settings for plugin in asked.values()))
        for slot, plugin in asked.items():
            check = functools.partial(_check_kinds, plugin, manifest, tables)
            result = attempt(plugin.origin, check)
            if isinstance(result, BrokenPlugin):
                failed[slot] = result
            else:
                manifest = manifest.with_kinds(plugin.kinds)
        for slot, plugin in asked.items():
            if slot not in failed:
                checked = attempt(plugin.origin, functools.partial(_check, plugin, manifest, taken))
                if isinstance(checked, BrokenPlugin):
                    failed[slot] = checked
                else:
                    taken |= checked.settings.keys()
        return failed


def _ask(
    candidate: Candidate, others: Iterable[LoadedPlugin], modules: Iterable[str | None] = ()
) -> LoadedPlugin:
    """Import a plugin, for what it says that it supplies, unchecked.

    Raises PluginError if it is one of the others, or one of the modules that are theirs.
    """
    plugin = candidate.load()
    if plugin is None:
        raise PluginError("the entry point leads to None")
    taken = [each.plugin for each in others] + [sys.modules.get(name or "") for name in modules]
    if any(plugin is other for other in taken):
        raise PluginError("another entry point leads to the same plugin")
    hook = _hook(plugin)
    return LoadedPlugin(
        plugin,
        candidate.origin,
        candidate.version,
        kinds=_joined(hook.blt_kinds()),
        components=tuple(itertools.chain(*hook.blt_components())),
        settings=_joined(hook.blt_settings()),
        hook=hook,
    )


def _joined(tables: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: item for table in tables for name, item in table.items()}


def _hook(plugin: object) -> pluggy.HookRelay:
    """What calls the hooks of one plugin, all of which must exist."""
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


def _check_kinds(plugin: LoadedPlugin, manifest: Manifest, taken: Collection[str]) -> None:
    """Raise PluginError for a kind that is none, or whose name has an owner."""
    for name, kind in plugin.kinds.items():
        if not isinstance(kind, Kind):
            raise PluginError(f"blt_kinds: {name!r}: expected a Kind, got {kind!r}")
        if not _KIND_NAME.fullmatch(name):
            raise PluginError(f"blt_kinds: {name!r}: a name is lower-case, as in 'stop_rule'")
        if name in manifest.kinds:
            raise PluginError(f"blt_kinds: there is a kind {name!r} already")
        if name in taken or name in RESERVED:
            raise PluginError(f"blt_kinds: the table [{name}] has an owner already")


def _check(plugin: LoadedPlugin, manifest: Manifest, taken: Collection[str]) -> LoadedPlugin:
    """The plugin, if all that it supplies keeps to its contract; else raises PluginError."""
    for kind in plugin.kinds.values():
        kind.load_protocol()
    seen: set[tuple[str, str]] = set()
    for record in plugin.components:
        check_record(record, manifest)
        if (record.kind, record.name) in seen:
            raise PluginError(f"{record.kind} {record.name!r} is supplied twice")
        seen.add((record.kind, record.name))
    for name, cls in plugin.settings.items():
        if name in RESERVED or name in manifest.kinds or name in taken:
            raise PluginError(f"blt_settings: the table [{name}] has an owner already")
        try:
            check_params(cls)
        except UnsupportedType as error:
            raise PluginError(f"blt_settings: {error}") from error
    return plugin
