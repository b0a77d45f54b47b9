"""A run's config on top of a checkpoint's: the model comes from the checkpoint.

A run may repeat what the checkpoint says, as a config that ``blt check`` printed does, and set the
keys that the component marks as overridable (thresholds, windows; not dims); training may also set
what it trains a part to do. Anything else in those tables is a problem.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import attrs

from blt_core.component import MANY, NESTED, nested_kinds, overridable_keys
from blt_core.errors import PluginError, Problem, near_match
from blt_core.plugins.loading import Plugins
from blt_core.protocols import MODEL_KINDS
from blt_core.tables.place import Place, Table
from blt_core.tables.structure import Invalid, default_of, params_fields, read_value, show
from blt_core.wiring.config import SCHEMA, Config, ModelSettings

Fields = Mapping[str, "attrs.Attribute[Any]"]

_STORED = ("model", *MODEL_KINDS)


def merge_checkpoint(
    config: Config,
    tables: Mapping[str, Any],
    plugins: Plugins,
    *,
    training: bool = False,
    kinds: Collection[str] = _STORED,
) -> Config:
    """The config of a run with the model tables of its checkpoint.

    ``tables``: what the checkpoint's format read. ``training``: whether the run trains the model
    further. ``kinds``: the tables that come from the checkpoint. What the run may not override is
    kept among the config's ``problems``, which ``resolve`` raises together with its own.
    """
    source = Table(tables, Place(config.checkpoint or "checkpoint"))
    merger = _Merger(plugins, training)
    if source.get("schema") != SCHEMA:
        text = f"expected {SCHEMA}, the one schema that this version reads, got "
        merger.problems.append(source.place_of("schema").problem(text + show(source.get("schema"))))
    model = {key: source[key] for key in kinds if key in source}
    run = {}
    for key, own in config.tables.items():
        if key in kinds:
            place = config.tables.place_of(key)
            model[key] = merger.override(key, model.get(key), own, place)
        else:
            run[key] = own
    merged = Table({**run, **model}, config.tables.place)
    problems = (*config.problems, *merger.problems)
    return attrs.evolve(config, tables=merged, problems=problems)


@attrs.frozen
class _Merger:
    plugins: Plugins
    training: bool
    problems: list[Problem] = attrs.field(factory=list)

    def override(self, kind: str, stored: Any, own: Any, place: Place) -> Any:
        """The checkpoint's table of a kind, with what the run may set in it."""
        if not isinstance(stored, Table) or not isinstance(own, Table):
            what = "has no such table" if stored is None else f"has {show(stored)} here"
            text = f"the checkpoint {what}; it cannot be replaced by {show(own)}"
            self.problems.append(place.problem(text))
            return stored
        params = self._params(kind, stored)
        if params is None:
            return stored
        fields, free = params_fields(params), overridable_keys(params, training=self.training)
        below, changes = nested_kinds(params), {}
        stored = stored.updated(_nested_defaults(stored, fields), {})
        for key, value in own.items():
            where = own.place_of(key)
            if key in free:
                changes[key] = value
            elif key in below and key in stored:
                change = self._override_each if MANY in fields[key].metadata else self.override
                changes[key] = change(below[key], stored[key], value, where)
            elif not _repeats(key, value, stored, fields):
                self.problems.append(_refusal(where, key, stored, fields, free))
        return stored.updated(changes, {key: own.place_of(key) for key in changes})

    def _override_each(self, kind: str, stored: Any, own: Any, place: Place) -> Any:
        """As ``override``, of a table of components."""
        if not isinstance(stored, Table) or not isinstance(own, Table):
            return self.override(kind, stored, own, place)
        changes = {
            key: self.override(kind, stored.get(key), value, own.place_of(key))
            for key, value in own.items()
        }
        return stored.updated({key: each for key, each in changes.items() if key in stored}, {})

    def _params(self, kind: str, stored: Table) -> type | None:
        """The class of the keys in a table; None if resolve will report its component's name."""
        if kind == "model":
            return ModelSettings
        try:
            return self.plugins.registry.lookup(kind, str(stored.get("use"))).record.params
        except PluginError:
            return None


def _nested_defaults(stored: Table, fields: Fields) -> dict[str, Any]:
    """The nested tables that a checkpoint leaves at their defaults."""
    absent = [f for f in fields.values() if NESTED in f.metadata and f.name not in stored]
    return {f.name: default_of(f) for f in absent if f.default is not attrs.NOTHING}


def _repeats(key: str, value: Any, stored: Table, fields: Fields) -> bool:
    """Whether a run says of a key what the checkpoint says, if only by leaving it out."""
    if key == "use":
        return bool(value == stored.get("use"))
    field = fields.get(key)
    if field is None or NESTED in field.metadata:
        return False
    try:
        held = read_value(field, stored[key]) if key in stored else default_of(field)
        return bool(read_value(field, value) == held)
    except Invalid:
        return False


def _refusal(
    place: Place, key: str, stored: Table, fields: Fields, free: frozenset[str]
) -> Problem:
    hint = f"overridable here: {', '.join(sorted(free)) or 'nothing'}"
    if key == "use":
        return place.problem(f"the checkpoint has {stored.get('use')!r}; it cannot be replaced")
    if key not in fields:
        return place.problem(f"unknown key.{near_match(key, fields)}", hint)
    return place.problem("comes from the checkpoint and cannot be overridden.", hint)
