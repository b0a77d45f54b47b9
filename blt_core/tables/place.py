"""Tables that know where they were written, so that every message can name the place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import tomli

from blt_core.errors import ConfigError, Problem
from blt_core.files import TOO_DEEP, check_depth, decode, explain


@attrs.frozen
class Place:
    """A source (file, checkpoint or option) and a dotted path within it.

    In the expansion of a preset the path is one within the expansion; ``preset`` is what the user
    named, and ``above`` where. ``trail``: the components whose defaults and expansions led here;
    empty for what the user wrote.
    """

    source: str
    path: str = ""
    preset: str = ""
    above: Place | None = None
    trail: tuple[str, ...] = ()

    @property
    def written(self) -> Place:
        """The place that the user wrote: for an expansion, that of the preset's table."""
        return self.above.written if self.above else self

    def child(self, *keys: str | int) -> Place:
        """The place of a key or list index below this one."""
        path = self.path
        for key in keys:
            if isinstance(key, int):
                path += f"[{key}]"
            else:
                path += f".{key}" if path else key
        return attrs.evolve(self, path=path)

    def default_of(self, component: str) -> Place:
        """This place, filled by the default of a component."""
        return attrs.evolve(self, trail=(*self.trail, component))

    def expansion(self, preset: str) -> Place:
        """The place of what the preset at this place expands to."""
        trail = (*self.trail, preset)
        return Place(self.source, preset=self.preset or preset, above=self, trail=trail)

    def setting(self, key: str, value: str) -> str:
        """How the text ``value`` is written for a key below this place, in a file or an option."""
        path = self.child(key).path
        return f"{path}={value}" if self.source.startswith("--") else f'{path} = "{value}"'

    def problem(self, text: str, *hints: str) -> Problem:
        """A problem at this place."""
        return Problem(str(self), text, hints)

    def __str__(self) -> str:
        source = f"{self.above} (expanded)" if self.above else self.source
        return f"{source}: {self.path}" if self.path else source


class Table(dict[str, Any]):
    """A TOML table and its place; tables below it are tables too.

    ``moved`` gives the places of keys that were written elsewhere: a run's override of a key that
    a checkpoint holds, or an option of the command line.
    """

    def __init__(
        self, values: Mapping[str, Any], place: Place, moved: Mapping[str, Place] | None = None
    ) -> None:
        self.place = place
        self.moved = dict(moved or {})
        super().__init__({key: self._placed(key, value) for key, value in values.items()})

    def place_of(self, key: str) -> Place:
        """Where ``key`` was written, or would be."""
        return self.moved.get(key) or self.place.child(key)

    def updated(self, values: Mapping[str, Any], moved: Mapping[str, Place]) -> Table:
        """A copy with some keys set, each written at its place in ``moved``."""
        return Table({**self, **values}, self.place, {**self.moved, **moved})

    def _placed(self, key: str, value: Any) -> Any:
        # A table that knows its place keeps it: a preset may have moved it into an expansion.
        if isinstance(value, Mapping) and not isinstance(value, Table):
            return Table(value, self.place_of(key))
        return value


#: Bytes of the largest TOML file that is read: some files have no end.
LARGEST = 1 << 24


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises ValueError for all that cannot be read: TOMLDecodeError for faults of syntax, a plain one
    for numbers and nesting that are beyond Python's limits.
    """
    try:
        tables = tomli.loads(text)
    except tomli.TOMLDecodeError:
        raise
    except ValueError as error:
        raise ValueError("an integer has too many digits") from error
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    check_depth(tables)
    return tables


def read_toml(path: Path) -> Table:
    """The tables of a TOML file, which know their place; raises as :func:`read_tables` does."""
    return Table(read_tables(path), Place(str(path)))


def _all_of(data: bytes) -> bytes:
    if len(data) > LARGEST:
        raise ValueError(f"larger than {LARGEST} bytes, or without an end: no file of tables")
    return data


def read_tables(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; ConfigError if it is missing, unreadable or malformed."""
    place, data = Place(str(path)), b""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        return parse_toml(decode(_all_of(data)))
    except FileNotFoundError:
        problem = place.problem("no such file")
    except OSError as error:
        problem = place.problem(f"cannot be read: {error.strerror}")
    except tomli.TOMLDecodeError as error:
        where = Place(f"{path}:{error.lineno}:{error.colno}")
        found = explain(data)
        problem = place.problem(found) if found else where.problem(error.msg)
    except ValueError as error:
        problem = place.problem(str(error))
    raise ConfigError([problem])
