"""The plugins of a process: their components, config tables and hooks.

Plugins are entry points of the group ``blt_core``: modules (or objects) with hooks. Their names
are read from the metadata of what is installed; a plugin is imported when something of its is
wanted (:mod:`blt_core.plugins.shelf` says when). A broken one is shown, with its cause, where
something that it may supply is named; the others work on.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from blt_core.errors import BltError
from blt_core.log import logger
from blt_core.plugins.entry_points import PLUGINS, BrokenPlugin, Found, Origin, find
from blt_core.plugins.registry import Registry
from blt_core.plugins.registry_file import Manifest, load_manifest
from blt_core.plugins.shelf import Candidate, LoadedPlugin, Shelf

if TYPE_CHECKING:
    from blt_core.wiring.config import Config

#: A plugin given by hand: distribution, entry point name, module or object with hooks.
Extra = tuple[str, str, object]


class _Tables(Mapping[str, type]):
    """Config tables of plugins, each with the attrs class of its keys.

    The names are known without an import. PluginError for a table whose plugin is broken.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def __getitem__(self, name: str) -> type:
        return self._shelf.table(name)

    def __contains__(self, name: object) -> bool:
        return name in self._shelf.tables()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shelf.tables())

    def __len__(self) -> int:
        return len(self._shelf.tables())


@attrs.frozen
class Plugins:
    """All plugins. Those whose hooks fail while they are used keep their components."""

    registry: Registry
    _shelf: Shelf = attrs.field(eq=False, repr=False)
    #: Those that were given by hand, beside what is installed.
    given: tuple[Extra, ...] = attrs.field(default=(), eq=False, repr=False)
    _failed: dict[tuple[Origin, str], BrokenPlugin] = attrs.field(
        factory=dict, init=False, eq=False, repr=False
    )

    @property
    def loaded(self) -> tuple[LoadedPlugin, ...]:
        """All plugins that work. Imports those that are not imported yet."""
        return self._shelf.load_all()

    @property
    def broken(self) -> tuple[BrokenPlugin, ...]:
        """Plugins that cannot be loaded, and those of which a hook has failed since.

        Imports those that are not imported yet, to find out.
        """
        return (*self.registry.broken, *self._failed.values())

    @property
    def settings(self) -> Mapping[str, type]:
        """Config tables of plugins, each with the attrs class of its keys."""
        return _Tables(self._shelf)

    @property
    def manifest(self) -> Manifest:
        """The policy in force."""
        return self.registry.manifest

    def check(self, config: Config) -> Mapping[str, object] | None:
        """The expanded tables of a config that the commands of a plugin run; None if none does.

        Raises ConfigError with all problems of such a config. A plugin that raises anything else
        is logged, counts as broken, and the others are asked.
        """
        for plugin in self._shelf.load_tables(config.tables.keys()):
            try:
                for tables in plugin.hook.blt_check(config=config, plugins=self):
                    return dict(tables)
            except (BltError, KeyboardInterrupt):  # noqa: PERF203 -- the others go on
                raise
            except BaseException as error:  # noqa: BLE001
                broken = BrokenPlugin(plugin.origin, error)
                self._failed[plugin.origin, "blt_check"] = broken
                logger().warning(f"{broken}; it is not asked", hook="blt_check")
        return None

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call a run hook of all plugins. What one raises is logged, once, and ends nothing."""
        # Plugins that are not imported yet have no such hooks: the index is of those without.
        for plugin in self._shelf.loaded():
            try:
                call = getattr(plugin.hook, hook)
                if call.get_hookimpls():
                    call(**arguments)
            except KeyboardInterrupt:  # noqa: PERF203 -- an observer must not end a run
                raise
            except BaseException as error:  # noqa: BLE001
                broken = BrokenPlugin(plugin.origin, error)
                if (plugin.origin, hook) not in self._failed:
                    logger().warning(f"{broken}; the run goes on", hook=hook)
                self._failed[plugin.origin, hook] = broken


def load_plugins(
    manifest: Manifest | None = None, *, extra: Iterable[Extra] = (), installed: bool = True
) -> Plugins:
    """The installed plugins, and ``extra`` ones; without arguments, the same each time.

    Never raises for a broken plugin; raises ConfigError if a registry.toml is malformed.
    """
    extra = tuple(extra)
    if manifest is None and not extra and installed:
        with _default_lock:
            return _load_default()
    return _load(load_manifest() if manifest is None else manifest, extra, installed=installed)


_default_lock = threading.RLock()


@functools.cache
def _load_default() -> Plugins:
    return _load(load_manifest(), (), installed=True)


def _load(manifest: Manifest, extra: tuple[Extra, ...], *, installed: bool) -> Plugins:
    found = find(PLUGINS) if installed else Found()
    candidates = [
        Candidate(point.origin, point.version, point.load, module=point.value)
        for point in found.points
    ]
    candidates += [
        Candidate(Origin(distribution, name), "", functools.partial(_given, plugin))
        for distribution, name, plugin in extra
    ]
    shelf = Shelf(manifest, candidates, found.broken)
    return Plugins(Registry(shelf.manifest, shelf), shelf, extra)


def _given(plugin: object) -> object:
    return plugin
