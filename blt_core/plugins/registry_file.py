"""The policy of ``registry.toml``: known components, preferences and blocks; and the kinds.

Entry points discover what is installed; this says what the core makes of it. The shipped file is
the base; a user's and then a project's file override it entry by entry, except that ``blocked``
lists add up: no file can unblock what another blocks.

Only the shipped file and installed plugins declare kinds, and only the shipped file says which
plugin is to be imported for what: entering a folder must not make code run.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from blt_core.component import Kind, not_empty, one_of
from blt_core.errors import ConfigError, Problem, near_match
from blt_core.files import decode, is_lfs_pointer
from blt_core.plugins.entry_points import canonical
from blt_core.resources import resource
from blt_core.tables.place import Place, Table, parse_toml, read_toml
from blt_core.tables.structure import Invalid, read_table

_FILE = "registry.toml"


@attrs.frozen
class Known:
    """A component that is known to exist: who supplies it, and how to install that."""

    distribution: str = attrs.field(validator=not_empty())
    install: str | None = None

    @property
    def command(self) -> str:
        """The command that installs it."""
        return self.install or f"pip install {self.distribution}"


@attrs.frozen
class _Indexed(Known):
    """An entry of the shipped file; ``plugin``: the entry point that supplies it."""

    plugin: str | None = attrs.field(default=None, validator=not_empty())


@attrs.frozen
class _Table:
    """An entry of the shipped file: the plugin whose config table it is."""

    distribution: str = attrs.field(validator=not_empty())
    plugin: str = attrs.field(validator=not_empty())


@attrs.frozen
class _Policy:
    """The keys of one file."""

    schema: int = attrs.field(validator=one_of(1))
    components: dict[str, dict[str, Known]] = attrs.field(factory=dict)
    prefer: dict[str, dict[str, str]] = attrs.field(factory=dict)
    blocked: tuple[str, ...] = ()


@attrs.frozen
class _ShippedPolicy:
    """The keys of the shipped file."""

    schema: int = attrs.field(validator=one_of(1))
    kinds: dict[str, Kind] = attrs.field(factory=dict)
    components: dict[str, dict[str, _Indexed]] = attrs.field(factory=dict)
    settings: dict[str, _Table] = attrs.field(factory=dict)
    prefer: dict[str, dict[str, str]] = attrs.field(factory=dict)
    blocked: tuple[str, ...] = ()


@attrs.frozen
class Supplier:
    """A plugin of the shipped index: its distribution and the name of its entry point."""

    distribution: str
    plugin: str


@attrs.frozen
class Index:
    """Which plugin supplies what, as the shipped file says, so that no other need be imported.

    components: by kind and name; tables: config tables of plugins, by name.
    """

    components: Mapping[tuple[str, str], Supplier] = attrs.field(factory=dict)
    tables: Mapping[str, Supplier] = attrs.field(factory=dict)

    @property
    def suppliers(self) -> frozenset[Supplier]:
        """All plugins of the index."""
        return frozenset((*self.components.values(), *self.tables.values()))

    def suppliers_of(self, kind: str, name: str | None = None) -> frozenset[Supplier]:
        """The plugins that supply components of a kind, or the one of that name."""
        return frozenset(
            supplier
            for (its_kind, its_name), supplier in self.components.items()
            if its_kind == kind and name in (None, its_name)
        )


@attrs.frozen
class Manifest:
    """The policy in force. Components and preferences are keyed by (kind, name).

    ``blocked``: distributions and ``kind/name``s, each with the file that blocks it. ``named``: the
    places in files that name a kind, which a plugin may be about to declare.
    """

    kinds: Mapping[str, Kind]
    components: Mapping[tuple[str, str], Known]
    prefer: Mapping[tuple[str, str], str]
    blocked: Mapping[str, str]
    index: Index = attrs.field(factory=Index)
    named: tuple[tuple[Place, str], ...] = ()

    @property
    def roots(self) -> tuple[str, ...]:
        """Kinds that may be a top-level table of a config."""
        return tuple(name for name, kind in self.kinds.items() if kind.root)

    def with_kinds(self, kinds: Mapping[str, Kind]) -> Manifest:
        """A copy with the kinds that plugins declare."""
        return attrs.evolve(self, kinds={**self.kinds, **kinds})

    def check_kinds(self) -> None:
        """Raise ConfigError if a file names a kind that neither the core nor a plugin declares."""
        hint = f"kinds: {', '.join(self.kinds)}"
        problems = [
            place.problem(f"no kind named {kind!r}.{near_match(kind, self.kinds)}", hint)
            for place, kind in self.named
            if kind not in self.kinds
        ]
        if problems:
            raise ConfigError(problems)

    def blocks_distribution(self, distribution: str) -> str | None:
        """The file that blocks a distribution, if any does."""
        same = canonical(distribution)
        return next((f for n, f in self.blocked.items() if canonical(n) == same), None)

    def blocks_component(self, kind: str, name: str) -> str | None:
        """The file that blocks a component, if any does."""
        return self.blocked.get(f"{kind}/{name}")


def load_manifest(files: Sequence[Path] | None = None) -> Manifest:
    """The manifest of ``files``, later ones overriding; by default shipped, user's, project's.

    The first is the shipped one, which alone holds kinds and the index. Raises ConfigError with the
    problems of all files.
    """
    shipped, *others = manifest_files() if files is None else files
    components: dict[tuple[str, str], Known] = {}
    prefer: dict[tuple[str, str], str] = {}
    blocked: dict[str, str] = {}
    named: list[tuple[Place, str]] = []
    problems: list[Problem] = []
    base = _ShippedPolicy(schema=1)
    for file in (shipped, *others):
        table = read_toml(file)
        policy: _Policy | _ShippedPolicy
        try:
            if file is shipped:
                policy = base = read_table(_ShippedPolicy, table, "registry.toml")
            else:
                problems += _only_shipped(table)
                policy = read_table(_Policy, _without(table, _SHIPPED_KEYS), "registry.toml")
        except Invalid as error:
            problems += error.problems
            continue
        components |= _by_kind_and_name(policy.components)
        prefer |= _by_kind_and_name(policy.prefer)
        blocked |= {name: blocked.get(name, str(file)) for name in policy.blocked}
        named += _named_kinds(table, policy.components, policy.prefer)
    if problems:
        raise ConfigError(problems)
    return Manifest(base.kinds, components, prefer, blocked, _index(base), tuple(named))


def _index(policy: _ShippedPolicy) -> Index:
    known = _by_kind_and_name(policy.components)
    return Index(
        {key: Supplier(one.distribution, one.plugin) for key, one in known.items() if one.plugin},
        {name: Supplier(one.distribution, one.plugin) for name, one in policy.settings.items()},
    )


#: Tables that would have code imported, each with where such things are declared instead.
_SHIPPED_KEYS = {
    "kinds": "declared by installed plugins, in the hook blt_kinds",
    "settings": "declared by installed plugins, in the hook blt_settings",
}


def _only_shipped(table: Table) -> list[Problem]:
    return [
        table.place_of(key).problem(
            f"not a table of this file: a file cannot have code imported; {key} are {instead}",
            "registry.toml takes: schema, components, prefer, blocked",
        )
        for key, instead in _SHIPPED_KEYS.items()
        if key in table
    ]


def _without(table: Table, keys: Iterable[str]) -> Table:
    kept = {key: value for key, value in table.items() if key not in keys}
    return Table(kept, table.place, table.moved)


def manifest_files() -> list[Path]:
    """The registry files that exist: shipped, then the user's, then the working directory's.

    A ``registry.toml`` in the working directory may belong to another program: it is taken for ours
    if it sets ``schema`` above its first table, whatever else is wrong with it, so that a slip in
    ours never drops a block in silence. Raises ConfigError for a file that cannot be looked at.
    """
    project = Path(_FILE)
    files = [resource(_FILE), *(file for file in _user_files() if _is_file(file))]
    # In a checkout of this repository the file is the one that ships, perhaps of another version.
    checkout = _is_file(Path("blt_core", "__init__.py"))
    if _is_file(project) and not checkout and _is_ours(project):
        files.append(project)
    return files


def _user_files() -> list[Path]:
    """Where the user's file would be; nowhere for an account without a home."""
    try:
        config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    except RuntimeError:
        return []
    return [config / "blt" / _FILE]


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        problem = Problem(str(path), f"cannot be read: {error.strerror}")
        raise ConfigError([problem]) from error


def _is_ours(path: Path) -> bool:
    try:
        data = path.read_bytes()
    except OSError:
        return True  # reading it whole will say why it cannot be read
    try:
        return "schema" in parse_toml(decode(data))
    except ValueError:
        # Nobody can tell whose file a pointer stands for; and without the zeros of UTF-16, and what
        # a byte order mark becomes, text in another encoding reads as it was meant.
        text = data.replace(b"\0", b"").decode(errors="replace").lstrip("\ufeff\ufffd")
        above_tables = re.split(r"^\s*\[", text, maxsplit=1, flags=re.MULTILINE)[0]
        schema = re.search(r"^\s*[\"']?schema[\"']?\s*=", above_tables, re.MULTILINE)
        return schema is not None or is_lfs_pointer(data)


def _by_kind_and_name(tables: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], Any]:
    return {(kind, name): item for kind, names in tables.items() for name, item in names.items()}


def _named_kinds(
    table: Table, components: Mapping[str, object], prefer: Mapping[str, object]
) -> list[tuple[Place, str]]:
    named = [("components", kind) for kind in components] + [("prefer", kind) for kind in prefer]
    return [(table.place_of(section).child(kind), kind) for section, kind in named]
