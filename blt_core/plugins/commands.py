"""The commands of ``blt``, each imported when it is run or its help is shown.

Commands are entry points of the group ``blt_core.commands``: the name of a command, and a function
whose signature typer reads (or a ``typer.Typer``, for a command that has others below it). Those
of the core are found in the same way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from blt_core.errors import PluginError
from blt_core.plugins.entry_points import (
    COMMANDS,
    CORE,
    BrokenPlugin,
    Point,
    attempt,
    canonical,
    find,
)
from blt_core.plugins.registry_file import Manifest

if TYPE_CHECKING:
    import typer
    from typer.core import TyperCommand, TyperGroup

    Command: TypeAlias = TyperCommand | TyperGroup


class Commands(Mapping[str, "Command"]):
    """Commands by name. Names are known from metadata; a look-up imports that command alone.

    A name belongs to the first distribution that takes it, the core before all. In the place of a
    command that cannot be imported stands one that says why.
    """

    def __init__(self, points: Sequence[Point], unreadable: Sequence[BrokenPlugin] = ()) -> None:
        self.unreadable = tuple(unreadable)
        self._points: dict[str, Point] = {}
        self._refused: list[BrokenPlugin] = []
        self._made: dict[str, Command | BrokenPlugin] = {}
        self._lock = threading.RLock()
        for point in points:
            name = point.origin.entry_point
            first = self._points.setdefault(name, point)
            if first is not point:
                error = PluginError(f"there is a command {name!r} already ({_owner(first)})")
                self._refused.append(BrokenPlugin(point.origin, error))

    def __getitem__(self, name: str) -> Command:
        made = self._make(name)
        return _stand_in(name, made) if isinstance(made, BrokenPlugin) else made

    def __contains__(self, name: object) -> bool:
        return name in self._points

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def owner(self, name: str) -> str | None:
        """The distribution of a command that is not the core's; None for others."""
        point = self._points.get(name)
        return _owner(point) if point is not None and not _is_core(point) else None

    def broken(self) -> tuple[BrokenPlugin, ...]:
        """The commands that cannot be used. Imports all, to find out."""
        made = [self._make(name) for name in self]
        return (*self._refused, *(each for each in made if isinstance(each, BrokenPlugin)))

    def _make(self, name: str) -> Command | BrokenPlugin:
        point = self._points[name]
        with self._lock:
            if name not in self._made:
                self._made[name] = attempt(point.origin, lambda: _command(name, point.load()))
            return self._made[name]


def find_commands(manifest: Manifest) -> Commands:
    """The commands of all installed distributions that are not blocked; none is imported.

    The core's own cannot be blocked: they tell what is.
    """
    found = find(COMMANDS)
    points = [
        point
        for point in found.points
        if _is_core(point) or not manifest.blocks_distribution(_owner(point))
    ]
    return Commands(points, found.broken)


def _is_core(point: Point) -> bool:
    return canonical(_owner(point)) == CORE


def _owner(point: Point) -> str:
    return point.origin.distribution


def _command(name: str, target: Any) -> Command:
    """What typer makes of a function or an app; raises what it raises, if that is none for it."""
    import typer
    from typer.main import get_group

    app = new_app()
    if isinstance(target, typer.Typer):
        app.add_typer(target, name=name)
    elif callable(target):
        app.command(name)(target)
    else:
        raise PluginError(f"the entry point leads to {target!r}, no function and no typer.Typer")
    command: Command = get_group(app).commands[name]  # type: ignore[assignment]
    return command


def new_app(**settings: Any) -> typer.Typer:
    """A typer app whose errors and help are plain text."""
    import typer

    return typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, **settings)


def _stand_in(name: str, broken: BrokenPlugin) -> Command:
    """A command that raises PluginError, whatever it is given; its help says so too."""
    from typer.core import TyperCommand

    def refuse(**_: object) -> None:
        raise PluginError(str(broken))

    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    return TyperCommand(name, callback=refuse, help=str(broken), context_settings=anything)
