"""Reading one table of a ``config.json``: what is wrong with it is gathered, not raised."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import attrs


@attrs.frozen
class JsonTable:
    """One table of ``config.json``; what it cannot give is added to ``problems`` by its path."""

    name: str
    values: Mapping[str, Any]
    problems: list[str]

    def part(self, name: str) -> JsonTable:
        """The table below this one."""
        values = self.values.get(name) or {}
        if not isinstance(values, Mapping):
            self.problems.append(f"{name}: expected a table, got {values!r}")
            values = {}
        return JsonTable(f"{name}.", values, self.problems)

    def get(self, *names: str, default: Any) -> Any:
        """The value of a key by its new or its old name; a null counts as absent."""
        found = (self.values[name] for name in names if self.values.get(name) is not None)
        return next(found, default)

    def integer(self, name: str, default: int) -> int:
        """A size or a count."""
        return self._whole(name, self.get(name, default=default), default)

    def window(self, name: str, default: int) -> int | None:
        """How many bytes a row sees: null stands for all, an absent key for the default."""
        value = self.values.get(name, default)
        return None if value is None else self._whole(name, value, default)

    def number(self, *names: str, default: float) -> float:
        """A finite number."""
        return self.finite(names[0], self.get(*names, default=default), default)

    def finite(self, name: str, value: Any, default: float) -> float:
        """The value of a key as a number; the default, and a problem, if it is none."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # of a whole number beyond all floats
                if math.isfinite(value):
                    return float(value)
        self.problems.append(f"{self.name}{name}: expected a number, got {value!r}")
        return default

    def integers(self, name: str, default: list[int]) -> list[int]:
        """A list of sizes."""
        value = self.get(name, default=default) or default
        if isinstance(value, list):
            return [self._whole(name, each, 1) for each in value]
        self.problems.append(f"{self.name}{name}: expected a list, got {value!r}")
        return default

    def demand(self, name: str, *supported: Any, default: Any) -> None:
        """Note a value that is not among those supported, of which the first is named."""
        if (value := self.values.get(name, default)) not in supported:
            source = "" if name in self.values else " (the default)"
            self.problems.append(
                f"{self.name}{name} = {value!r}{source} is not supported; expected {supported[0]!r}"
            )

    def _whole(self, name: str, value: Any, default: int) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        self.problems.append(f"{self.name}{name}: expected a whole number from 1 on, got {value!r}")
        return default
