"""The components that plugins supply, by kind and name.

What a name stands for never changes, though plugins may be imported only when one of their names
is looked up. Records are checked before they enter, by :func:`check_record`; names that two
distributions supply are an error only when they are used.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Sequence
from importlib import metadata
from typing import Protocol

import attrs

from blt_core.component import Component, Preset, nested_kinds
from blt_core.errors import PluginError, near_match
from blt_core.plugins.entry_points import BrokenPlugin, Origin, canonical
from blt_core.plugins.registry_file import Known, Manifest
from blt_core.plugins.signatures import mismatches
from blt_core.tables.structure import UnsupportedType, article, check_params

_NAME = re.compile(r"([a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*")
_LIST_ALL = "list all: blt plugins"
#: Names with a slash are those of plugins of others.
_OF_A_PLUGIN = "a plugin has to be installed first: pip install -e . in its folder, if it is yours"


@attrs.frozen
class Entry:
    """A component or preset, and where it comes from."""

    record: Component | Preset
    origin: Origin

    @property
    def label(self) -> str:
        """How messages name it: ``sampler 'ar' (blt-core)``."""
        return f"{_describe(self.record)} ({self.origin.distribution})"


class Supply(Protocol):
    """The plugins behind a registry."""

    def entries(self, kind: str | None = None, name: str | None = None) -> Sequence[Entry]:
        """At least what is supplied of a kind, or of a name of it, in a fixed order."""
        ...

    def broken(self) -> tuple[BrokenPlugin, ...]:
        """Every plugin that cannot be loaded."""
        ...


@attrs.frozen
class Registry:
    """What is installed, under the policy of a manifest."""

    manifest: Manifest
    _supply: Supply = attrs.field(eq=False, repr=False)

    @property
    def entries(self) -> Sequence[Entry]:
        """Everything that is installed. Imports all plugins."""
        return self._supply.entries()

    @property
    def broken(self) -> tuple[BrokenPlugin, ...]:
        """Plugins that cannot be loaded. Imports all plugins, to find out."""
        return self._supply.broken()

    def names(self, kind: str) -> list[str]:
        """Installed names of a kind, sorted. Imports the plugins that supply some."""
        entries = self._supply.entries(kind)
        return sorted({e.record.name for e in entries if self._usable(e, kind)})

    def lookup(self, kind: str, name: str) -> Entry:
        """The entry of a name. Imports the plugins that may supply it.

        Raises PluginError if there is none, or if several distributions supply it and the
        manifest prefers none of them.
        """
        entries = self._supply.entries(kind, name)
        found = [e for e in entries if self._usable(e, kind) and e.record.name == name]
        if len(found) > 1:
            found = self._preferred(kind, name, found)
        if not found:
            raise self._unknown(kind, name)
        return found[0]

    def takers(self, kind: str, key: str) -> list[str]:
        """The names of the installed components of a kind that take a key."""
        found = [e.record for e in self.entries if self._usable(e, kind)]
        return sorted({r.name for r in found if key in {f.name for f in attrs.fields(r.params)}})

    def status(self, entry: Entry) -> str:
        """``ok``, or why an entry is not what its name stands for in a config."""
        kind, name = entry.record.kind, entry.record.name
        if file := self.manifest.blocks_component(kind, name):
            return f"blocked by {file}"
        try:
            chosen = self.lookup(kind, name)
        except PluginError:
            same = [e for e in self.entries if (e.record.kind, e.record.name) == (kind, name)]
            others = [e.origin.distribution for e in same if e is not entry]
            return f"conflict with {', '.join(others)}"
        return "ok" if chosen is entry else f"{chosen.origin.distribution} is preferred"

    def check_instance(self, entry: Entry, instance: object) -> None:
        """Raise PluginError unless a built component fulfils the protocol of its kind."""
        protocol = self.manifest.kinds[entry.record.kind].load_protocol()
        faults = mismatches(protocol, instance)
        if faults:
            raise PluginError(f"{entry.label}: {type(instance).__name__}: {'; '.join(faults)}")

    def _usable(self, entry: Entry, kind: str) -> bool:
        record = entry.record
        return record.kind == kind and not self.manifest.blocks_component(kind, record.name)

    def _preferred(self, kind: str, name: str, found: Sequence[Entry]) -> list[Entry]:
        wanted = canonical(self.manifest.prefer.get((kind, name), ""))
        preferred = [e for e in found if canonical(e.origin.distribution) == wanted]
        if len(preferred) == 1:
            return preferred
        example = found[0].origin.distribution
        raise PluginError(
            f"{name!r} is supplied by {' and '.join(str(e.origin) for e in found)}.",
            (f'fix: in registry.toml, [prefer.{kind}] "{name}" = "{example}"',),
        )

    # -- why a name is not there -----------------------------------------------------------------

    def _unknown(self, kind: str, name: str) -> PluginError:
        kinds = self.manifest.kinds
        if kind not in kinds:
            return PluginError(f"no kind named {kind!r}.{near_match(kind, kinds)}")
        if file := self.manifest.blocks_component(kind, name):
            return PluginError(
                f"{name!r} is blocked by {file}.", ("fix: remove it from 'blocked'",)
            )
        if known := self.manifest.components.get((kind, name)):
            return self._known_but_absent(name, known)
        if other := self._of_another_kind(kind, name):
            return other
        words, names = kind.replace("_", " "), self.names(kind)
        candidates = {*names, *(n for k, n in self.manifest.components if k == kind)}
        installed = f"installed {plural(words)}: {', '.join(names) or 'none'}      {_LIST_ALL}"
        text = f"no {words} named {name!r}.{near_match(name, sorted(candidates))}"
        missing = (_OF_A_PLUGIN,) if "/" in name else ()
        return PluginError(text, (installed, *missing, *map(str, self.broken)))

    def _of_another_kind(self, kind: str, name: str) -> PluginError | None:
        """A name that belongs to another kind, and how it is used."""
        for other in self.manifest.kinds:
            if other == kind or name not in self.names(other):
                continue
            text = f"no {_words(kind)} named {name!r}; it is {article(other)}"
            if other in self.manifest.roots:
                return PluginError(f"{text}:", (f'[{other}] use = "{name}"',))
            if way := self.way_to_nest(kind, other):
                return PluginError(f"{text}:", (f"{way}.use={name}",))
            return PluginError(f"{text}.", (f"blt plugins show {other} {name}",))
        return None

    def way_to_nest(self, kind: str, other: str) -> str:
        """A component of ``kind`` and its field for one of ``other``; ``speculative drafter``."""
        ways = [
            f"{entry.record.name} {field}"
            for entry in self.entries
            if self._usable(entry, kind)
            for field, nested in nested_kinds(entry.record.params).items()
            if nested == other
        ]
        return min(ways, default="")

    def _known_but_absent(self, name: str, known: Known) -> PluginError:
        """A name that the manifest knows: not installed, blocked, broken, or out of step."""
        supplier = canonical(known.distribution)
        if file := self.manifest.blocks_distribution(supplier):
            text = f"{name!r} is known, but its plugin ({known.distribution}) is blocked by {file}."
            return PluginError(text, ("fix: remove it from 'blocked'",))
        broken = [b for b in self.broken if canonical(b.origin.distribution) == supplier]
        if broken:
            text = f"{name!r} is known, but its plugin is broken."
            return PluginError(text, tuple(map(str, broken)))
        try:
            version = metadata.version(known.distribution)
        except metadata.PackageNotFoundError:
            text = f"{name!r} is known, but its plugin is not installed."
            return PluginError(text, (f"fix: {known.command}",))
        except Exception:  # noqa: BLE001 -- importlib raises anything for damaged metadata
            version = "(of unknown version)"
        text = f"{name!r} is known, but {known.distribution} {version} does not supply it."
        return PluginError(text, (f"fix: {known.command} --upgrade", _LIST_ALL))


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def plural(words: str) -> str:
    """``samplers``, ``corpuses``."""
    return words + ("es" if words.endswith("s") else "s")


# -- registration --------------------------------------------------------------------------------


def check_record(record: Component | Preset, manifest: Manifest) -> None:
    """Raise PluginError if a component or preset breaks the contract of its kind."""
    if not isinstance(record, (Component, Preset)):
        raise PluginError(f"blt_components gave {record!r}, which is no Component or Preset")
    label = _describe(record)
    if record.kind not in manifest.kinds:
        near = near_match(record.kind, manifest.kinds)
        raise PluginError(f"{label}: no kind named {record.kind!r}.{near}")
    if not _NAME.fullmatch(record.name):
        raise PluginError(f"{label}: a name is lower-case, as in 'tree' or 'acme/tree'")
    try:
        check_params(record.params)
    except UnsupportedType as error:
        raise PluginError(f"{label}: {error}") from error
    for field, kind in nested_kinds(record.params).items():
        if kind not in manifest.kinds:
            near = near_match(kind, manifest.kinds)
            raise PluginError(f"{label}: {field}: no kind named {kind!r}.{near}")
    if isinstance(record, Component):
        _check_dims(record, label)
        _check_requirements(record, label, manifest)
        _check_factory(record, label, manifest.kinds[record.kind].load_protocol())


def _describe(record: Component | Preset) -> str:
    return f"{record.kind.replace('_', ' ')} {record.name!r}"


def _check_dims(component: Component, label: str) -> None:
    plain = {f.name for f in attrs.fields(component.params)} - {*nested_kinds(component.params)}
    for dim, field in component.dims.items():
        if field not in plain:
            raise PluginError(
                f"{label}: dims: {dim!r} names the field {field!r}, which "
                f"{component.params.__name__} does not have.{near_match(field, plain)}"
            )


def _check_requirements(component: Component, label: str, manifest: Manifest) -> None:
    for requirement in component.requires:
        kind, _, ability = requirement.partition(".")
        if kind not in manifest.kinds or not ability:
            near = near_match(kind, manifest.kinds)
            raise PluginError(
                f"{label}: requires: expected 'kind.ability', got {requirement!r}.{near}"
            )


def _check_factory(component: Component, label: str, protocol: type) -> None:
    factory = component.factory
    try:
        inspect.signature(factory).bind(None, None)
    except (TypeError, ValueError) as error:
        raise PluginError(f"{label}: factory must take (params, context): {error}") from error
    made = factory if isinstance(factory, type) else _returned_class(factory)
    # A factory annotated with the protocol itself says nothing yet: its instance is checked.
    if made is not None and not getattr(made, "_is_protocol", False):
        faults = mismatches(protocol, made)
        if faults:
            raise PluginError(f"{label}: {made.__name__}: {'; '.join(faults)}")


def _returned_class(factory: object) -> type | None:
    try:
        returned = typing.get_type_hints(factory).get("return")
    except (NameError, TypeError):  # names only imported for type checkers, or no function at all
        return None
    return returned if isinstance(returned, type) else None
