"""A run's config on top of a checkpoint's: the model comes from the checkpoint.

A run may repeat the checkpoint's ``use`` and set the keys that the component marks as overridable
(thresholds, windows; not dims); anything else in those tables is a problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from blt_core._structure import params_fields, show
from blt_core._tables import Place, Table
from blt_core.component import nested_kinds, overridable_keys
from blt_core.config import MODEL_KINDS, SCHEMA, Config
from blt_core.errors import PluginError, Problem, near_match
from blt_core.plugins import Plugins

_STORED = ("model", *MODEL_KINDS)


def merge_checkpoint(config: Config, tables: Mapping[str, Any], plugins: Plugins) -> Config:
    """The config of a run with the model tables of its checkpoint.

    ``tables``: what the checkpoint's format read. What the run may not override is kept among the
    config's ``problems``, which ``resolve`` raises together with its own.
    """
    source = Table(tables, Place(config.checkpoint or "checkpoint"))
    merger = _Merger(plugins)
    if source.get("schema") != SCHEMA:
        text = f"expected {SCHEMA}, the one schema that this version reads, got "
        merger.problems.append(source.place_of("schema").problem(text + show(source.get("schema"))))
    model = {key: source[key] for key in _STORED if key in source}
    run = {}
    for key, own in config.tables.items():
        if key in _STORED:
            place = config.tables.place_of(key)
            model[key] = merger.override(key, model.get(key), own, place)
        else:
            run[key] = own
    merged = Table({**run, **model}, config.tables.place)
    return Config(merged, (*config.problems, *merger.problems))


@attrs.frozen
class _Merger:
    plugins: Plugins
    problems: list[Problem] = attrs.field(factory=list)

    def override(self, kind: str, stored: Any, own: Any, place: Place) -> Any:
        """The checkpoint's table of a kind, with what the run may set in it."""
        if not isinstance(stored, Table) or not isinstance(own, Table):
            what = "has no such table" if stored is None else f"has {show(stored)} here"
            text = f"the checkpoint {what}; it cannot be replaced by {show(own)}"
            self.problems.append(place.problem(text))
            return stored
        fields, free, below = self._keys(kind, stored)
        changes = {}
        for key, value in own.items():
            where = own.place_of(key)
            if key == "use" and value == stored.get("use"):
                continue
            if key in free:
                changes[key] = value
            elif key in below and key in stored:
                changes[key] = self.override(below[key], stored[key], value, where)
            else:
                self.problems.append(_refusal(where, key, stored, fields, free))
        return stored.updated(changes, {key: own.place_of(key) for key in changes})

    def _keys(self, kind: str, stored: Table) -> tuple[list[str], frozenset[str], dict[str, str]]:
        """Of the component in a table: its keys, those that a run may set, nested kinds."""
        try:
            params = self.plugins.registry.lookup(kind, str(stored.get("use"))).record.params
        except PluginError:  # ``model``; or a name that resolve will report
            return list(stored), frozenset(), {}
        return list(params_fields(params)), overridable_keys(params), nested_kinds(params)


def _refusal(
    place: Place, key: str, stored: Table, fields: list[str], free: frozenset[str]
) -> Problem:
    hint = f"overridable here: {', '.join(sorted(free)) or 'nothing'}"
    if key == "use":
        return place.problem(f"the checkpoint has {stored.get('use')!r}; it cannot be replaced")
    if key not in fields:
        return place.problem(f"unknown key.{near_match(key, fields)}", hint)
    return place.problem("comes from the checkpoint and cannot be overridden.", hint)
