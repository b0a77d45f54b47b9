"""``blt plugins show``: all that is known of one component."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import attrs
import tomli_w

from blt_core.cli.streams import output
from blt_core.component import ABILITIES, NESTED, Component, Preset, range_of
from blt_core.errors import PluginError, near_match
from blt_core.plugins.loading import Plugins
from blt_core.plugins.registry import Entry
from blt_core.tables.structure import default_of, describe_field, params_fields, plain
from blt_core.wiring.config import without_none
from blt_core.wiring.resolve import resolve_component


def find_entries(loaded: Plugins, kind: str, name: str) -> list[Entry]:
    """The entries of a name, one a supplier; PluginError, with near matches, if there is none."""
    check_kind(loaded, kind)
    record = (kind, name)
    found = [e for e in loaded.registry.entries if (e.record.kind, e.record.name) == record]
    return found or [loaded.registry.lookup(kind, name)]


def check_kind(loaded: Plugins, kind: str) -> None:
    """Raise PluginError, with a near match, unless there is a kind of that name."""
    kinds = loaded.manifest.kinds
    if kind not in kinds:
        raise PluginError(
            f"no kind named {kind!r}.{near_match(kind, kinds)}\n  kinds: {', '.join(kinds)}"
        )


def describe(loaded: Plugins, entry: Entry) -> dict[str, Any]:
    """The stable JSON form of one component; documented in docs/cli.md."""
    record = entry.record
    made_by = record.expand if isinstance(record, Preset) else record.factory
    return {
        "kind": record.kind,
        "name": record.name,
        "summary": record.summary,
        "status": loaded.registry.status(entry),
        "distribution": entry.origin.distribution,
        "version": next((p.version for p in loaded.loaded if p.origin == entry.origin), "") or None,
        "entry_point": entry.origin.entry_point,
        "object": f"{getattr(made_by, '__module__', '?')}:{_qualified(made_by)}",
        "keys": [_key(field, _meanings(record.params)) for field in _fields(record).values()],
        "provides": _provides(record, loaded),
        "requires": sorted(record.requires) if isinstance(record, Component) else [],
        "dims": dict(record.dims) if isinstance(record, Component) else {},
        "expands_to": _expansion(record),
        "example": example(loaded, record),
    }


def show(description: dict[str, Any]) -> None:
    """Print a description for people."""
    about = description
    version = f" {about['version']}" if about["version"] else ""
    output(f"{about['kind']} {about['name']}: {about['summary']}")
    output(f"from {about['distribution']}{version}, plugin {about['entry_point']!r}, "
           f"{about['object']}")  # fmt: skip
    if about["status"] != "ok":
        output(f"status: {about['status']}")
    output()
    output("keys" if about["keys"] else "takes no keys")
    for key in about["keys"]:
        wanted = ", ".join(filter(None, (key["type"], key["range"])))
        default = "required" if key["required"] else f"default {spelt(key['default'])}"
        output(f"  {key['name']}: {wanted}; {default}")
        if key["meaning"]:
            output(f"      {key['meaning']}")
    for name, values in _facts(about):
        output(f"\n{name}:{values}")
    output(f"\nexample\n{_indented(about['example'])}")


def _facts(about: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if about["provides"]:
        yield "provides, by default", " " + ", ".join(about["provides"])
    if about["requires"]:
        yield "requires", " " + ", ".join(about["requires"])
    if about["dims"]:
        dims = ", ".join(f"{dim} ({field})" for dim, field in about["dims"].items())
        yield "must agree with other parts on", f" {dims}"
    if about["expands_to"]:
        yield "by default a preset for", "\n" + _indented(tomli_w.dumps(about["expands_to"]))


def example(loaded: Plugins, record: Component | Preset) -> str:
    """TOML of the component where it belongs, with its defaults; what is required is a comment."""
    above, path = _place(loaded, record.kind)
    lines = [*above, f"[{path}]", f'use = "{record.name}"']
    for name, field in _fields(record).items():
        default = _default(field)
        if NESTED in field.metadata:
            if isinstance(default, dict):
                lines.append(f'{name}.use = "{default["use"]}"')
            else:
                lines.append(f"# {name}: {describe_field(field)}")
        elif field.default is attrs.NOTHING:
            wanted = ", ".join(filter(None, (describe_field(field), range_of(field))))
            lines.append(f"# {name} = …  {wanted}")
        elif default is not None:
            lines.append(tomli_w.dumps({name: default}).strip())
    return "\n".join(lines)


def _place(loaded: Plugins, kind: str) -> tuple[list[str], str]:
    """The tables above one of ``kind``, and its own path: ``sampler.drafter`` for a drafter."""
    if kind in loaded.manifest.roots:
        return [], kind
    for root in loaded.manifest.roots:
        if way := loaded.registry.way_to_nest(root, kind):
            owner, field = way.split(" ")
            return [f"[{root}]", f'use = "{owner}"'], f"{root}.{field}"
    return [], kind


def _fields(record: Component | Preset) -> dict[str, attrs.Attribute[Any]]:
    return params_fields(record.params)


def _key(field: attrs.Attribute[Any], meanings: dict[str, str]) -> dict[str, Any]:
    return {
        "name": field.name,
        "type": describe_field(field),
        "required": field.default is attrs.NOTHING,
        "default": _default(field),
        "range": range_of(field) or None,
        "meaning": meanings.get(field.name),
    }


def _default(field: attrs.Attribute[Any]) -> Any:
    default = default_of(field)
    return None if default is attrs.NOTHING else without_none(plain(default))


def _meanings(params: type) -> dict[str, str]:
    """What a params class says of its keys: sentences that begin with ``key:`` in its docstring.

    And in those of the params classes that it extends.
    """
    texts = [each.__doc__ or "" for each in reversed(params.__mro__) if attrs.has(each)]
    text = " ".join(" ".join(texts).replace("``", "").split())
    names = "|".join(map(re.escape, params_fields(params))) or "(?!)"
    # "key: …", "one, other: …", "key of such a thing: …", at the beginning of a sentence.
    begin = re.compile(rf"(?:^|(?<=[.;:] ))((?:{names})(?:, (?:{names}))*)( [^:.]{{1,40}})?: ")
    found = list(begin.finditer(text))
    meanings: dict[str, str] = {}
    for match, after in zip_longest(found, found[1:]):
        said = text[match.end() : after.start() if after else len(text)].strip()
        for name in match[1].split(", "):
            meanings[name] = f"{match[2].strip()}: {said}" if match[2] else said
    return meanings


def _provides(record: Component | Preset, loaded: Plugins) -> list[str] | None:
    """Abilities with default keys; None where keys without a default decide."""
    if isinstance(record, Preset):
        return []
    try:
        node = resolve_component(record.kind, {"use": record.name}, loaded)
        return sorted(node.component.provides(node.params))
    except Exception:  # noqa: BLE001 -- params that need keys, or a plugin's fault
        return None


def _expansion(record: Component | Preset) -> dict[str, Any] | None:
    """What a preset stands for with its defaults; None where it needs keys, or is none."""
    if isinstance(record, Component):
        return None
    # For a model that can do whatever presets ask for.
    known = (frozenset(f"decoder.{name}" for name in ABILITIES),) if record.adapts else ()
    try:
        return without_none(plain(record.expand(record.params(), *known)))  # type: ignore[no-any-return]
    except Exception:  # noqa: BLE001 -- params that need keys, or a plugin's fault
        return None


def _qualified(thing: object) -> str:
    return getattr(thing, "__qualname__", type(thing).__qualname__)


def spelt(value: Any) -> str:
    """A default as people read it: TOML, the name of a component, or ``none``."""
    if isinstance(value, dict):
        return str(value.get("use", value))
    return "none" if value is None else tomli_w.dumps({"x": value}).strip().removeprefix("x = ")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" if line else line for line in text.strip().splitlines())
