"""Reading entry points from the metadata of installed distributions, whatever state it is in.

``importlib.metadata.entry_points`` raises for the first file that is malformed, be it that of a
distribution which has nothing to do with this one. Here each distribution is read by itself: what
is wrong with one is told with its name, and the others are found.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import attrs

from blt_core.errors import PluginError

#: Entry points of plugins: modules (or objects) with hooks.
PLUGINS = "blt_core"
#: Entry points of commands of ``blt``: typer functions and groups, by the names of the commands.
COMMANDS = "blt_core.commands"
_WORDS = {PLUGINS: "plugin", COMMANDS: "command"}
#: The distribution whose entry points come first.
CORE = "blt-core"

_FILE = "entry_points.txt"

T = TypeVar("T")


@attrs.frozen
class Origin:
    """Where something comes from: a distribution, and the entry point that names it.

    Without an entry point it is the distribution as a whole. ``group``: that of the entry point.
    """

    distribution: str
    entry_point: str = ""
    group: str = PLUGINS

    def __str__(self) -> str:
        if not self.entry_point:
            return f"distribution {self.distribution!r}"
        return f"{_WORDS[self.group]} {self.entry_point!r} ({self.distribution})"


@attrs.frozen
class BrokenPlugin:
    """A plugin, command or distribution that cannot be used, and why."""

    origin: Origin
    cause: BaseException

    def __str__(self) -> str:
        return f"{self.origin} is broken: {_words(self.cause)}"


def _words(cause: BaseException) -> str:
    """What an exception says; of those that are not ours, the type too."""
    try:
        text = str(cause)
    except Exception as error:  # noqa: BLE001 -- the exception is a plugin's, and so is its text
        text = f"(its message cannot be shown: {type(error).__name__})"
    return text if isinstance(cause, PluginError) else f"{type(cause).__name__}: {text}"


def attempt(origin: Origin, work: Callable[[], T]) -> T | BrokenPlugin:
    """What ``work`` gives, or the broken plugin that it is if it raises, be it SystemExit.

    Ctrl-C alone ends more than one plugin: KeyboardInterrupt, which says whose import it met.
    """
    try:
        return work()
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted while {origin} was imported") from error
    except BaseException as error:  # noqa: BLE001 -- the others work on
        return BrokenPlugin(origin, error)


@attrs.frozen
class Point:
    """An entry point that is not imported yet. ``value``: ``package.module:object``."""

    origin: Origin
    version: str
    value: str

    def load(self) -> object:
        """Import what it names. Raises PluginError if that is not there; what an import raises."""
        match = _VALUE.fullmatch(self.value)
        if match is None:
            raise PluginError(
                f"its entry point is {self.value!r}; expected 'package.module' or "
                "'package.module:object'"
            )
        module = importlib.import_module(match["module"])
        path = match["path"]
        try:
            return functools.reduce(getattr, path.split("."), module) if path else module
        except AttributeError as error:
            raise PluginError(f"{match['module']} has no {path!r}") from error


_IDENTIFIER = r"[^\W\d]\w*"
_DOTTED = rf"{_IDENTIFIER}(?:\.{_IDENTIFIER})*"
_VALUE = re.compile(rf"(?P<module>{_DOTTED})(?:\s*:\s*(?P<path>{_DOTTED}))?\s*(?:\[.*\])?\s*")


@attrs.frozen
class Found:
    """The entry points of one group, and the distributions that could not be read."""

    points: tuple[Point, ...] = ()
    broken: tuple[BrokenPlugin, ...] = ()


def find(group: str) -> Found:
    """The entry points of a group, of all distributions on ``sys.path``; nothing is imported.

    Those of the core come first, then by distribution and name. The order of ``sys.path`` decides
    only which of several versions of one distribution counts: the first, as for Python itself.
    """
    points: list[Point] = []
    broken: list[BrokenPlugin] = []
    for distribution in _distributions():
        try:
            points += _points(distribution, group)
        except Exception as error:  # noqa: BLE001, PERF203 -- the others are found
            broken.append(BrokenPlugin(Origin(_folder_name(distribution)), error))
    points.sort(key=_order)
    return Found(tuple(points), tuple(sorted(broken, key=lambda each: each.origin.distribution)))


def let_torch_be_imported() -> None:
    """Have torch not look for backends of other distributions, where it would fail to be imported.

    It asks importlib for their entry points while it is imported, and raises with it.
    """
    try:
        metadata.entry_points(group="torch.backends")
    except Exception:  # noqa: BLE001 -- whatever it raises, torch would
        os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


def canonical(distribution: str) -> str:
    """A distribution name as package indexes compare it: ``Blt_Acme`` is ``blt-acme``."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _order(point: Point) -> tuple[bool, str, str, str]:
    origin = point.origin
    core = canonical(origin.distribution) == CORE
    return not core, origin.distribution, point.version, origin.entry_point


def _distributions() -> Iterator[metadata.Distribution]:
    """The installed distributions, each name once: an upgrade may leave an old one behind."""
    seen = set()
    for distribution in metadata.distributions():
        name = canonical(_folder_name(distribution))
        if name not in seen:
            seen.add(name)
            yield distribution


def _points(distribution: metadata.Distribution, group: str) -> Iterator[Point]:
    folder = _folder(distribution)
    if folder is not None and (folder / _FILE).exists():
        # importlib takes a file that cannot be read for one that is not there.
        with (folder / _FILE).open("rb"):
            pass
    try:
        named = [point for point in distribution.entry_points if point.group == group]
    except UnicodeDecodeError as error:
        raise PluginError(f"{_FILE} is not UTF-8 text: {error.reason}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise PluginError(f"{_FILE} is malformed; expected lines 'name = module:object'") from error
    if not named:
        return
    # Only now: the metadata of the many distributions that have nothing for us is none of ours.
    name, version = _name_and_version(distribution)
    for point in named:
        if not point.name:
            raise PluginError(f"{_FILE} has an entry point without a name in [{group}]")
        yield Point(Origin(name, point.name, group), version, point.value or "")


def _name_and_version(distribution: metadata.Distribution) -> tuple[str, str]:
    """What the metadata says; PluginError if it names no distribution."""
    cause: Exception | None = None
    try:
        found: Any = distribution.metadata
        name, version = found.get("Name"), found.get("Version")
    except Exception as error:  # noqa: BLE001 -- importlib's differ from version to version
        name, version, cause = "", "", error
    if not name:
        text = "its METADATA is missing, damaged or without a Name; install it again"
        raise PluginError(text) from cause
    return str(name), str(version or "")


def _folder(distribution: metadata.Distribution) -> Path | None:
    """The .dist-info or .egg-info; None for distributions of other finders."""
    # No public attribute leads there, and importlib itself cannot tell a damaged one's name.
    path = getattr(distribution, "_path", None)
    return path if isinstance(path, Path) else None


def _folder_name(distribution: metadata.Distribution) -> str:
    """The name of a distribution as far as its folder tells, for its metadata may be damaged."""
    folder = _folder(distribution)
    if folder is not None and folder.suffix in (".dist-info", ".egg-info"):
        # A name whose dashes were not escaped has them: "blt-acme-1.0.dist-info".
        return re.split(r"-(?=\d)", folder.stem, maxsplit=1)[0]
    try:
        return str(distribution.metadata["Name"])
    except Exception:  # noqa: BLE001 -- nothing names it
        return str(folder or "unknown")
