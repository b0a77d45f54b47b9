"""The policy of ``registry.toml``: kinds, known components, preferences and blocks.

Entry points discover what is installed; this says what the core makes of it. The shipped file is
the base; a user's and then a project's file override it entry by entry, except that ``blocked``
lists add up: no file can unblock what another blocks.
"""

from __future__ import annotations

import importlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from blt_core._structure import Invalid, read_table
from blt_core._tables import Table, parse_toml, read_toml
from blt_core.component import not_empty, one_of
from blt_core.errors import ConfigError, PluginError, Problem, near_match
from blt_core.files import decode, is_lfs_pointer
from blt_core.resources import resource

_FILE = "registry.toml"


def _import_path(_: object, __: attrs.Attribute[str], value: str) -> None:
    if not re.fullmatch(r"[\w.]+:\w+", value):
        raise ValueError(f"expected an import path such as 'package.module:Name', got {value!r}")


@attrs.frozen
class Kind:
    """A kind of component: ``protocol`` is the import path of its contract.

    ``root``: whether it may be a top-level table of a config.
    """

    protocol: str = attrs.field(validator=_import_path)
    summary: str
    root: bool = False

    def load_protocol(self) -> type:
        """Import the protocol class."""
        module, _, name = self.protocol.partition(":")
        try:
            protocol = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise PluginError(f"protocol {self.protocol!r} cannot be imported: {error}") from error
        return protocol  # type: ignore[no-any-return]


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
class _Policy:
    """The keys of one file."""

    schema: int = attrs.field(validator=one_of(1))
    kinds: dict[str, Kind] = attrs.field(factory=dict)
    components: dict[str, dict[str, Known]] = attrs.field(factory=dict)
    prefer: dict[str, dict[str, str]] = attrs.field(factory=dict)
    blocked: tuple[str, ...] = ()


@attrs.frozen
class Manifest:
    """The policy in force. Components and preferences are keyed by (kind, name).

    ``blocked``: distributions and ``kind/name``s, each with the file that blocks it.
    """

    kinds: Mapping[str, Kind]
    components: Mapping[tuple[str, str], Known]
    prefer: Mapping[tuple[str, str], str]
    blocked: Mapping[str, str]

    @property
    def roots(self) -> tuple[str, ...]:
        """Kinds that may be a top-level table of a config."""
        return tuple(name for name, kind in self.kinds.items() if kind.root)

    def blocks_distribution(self, distribution: str) -> str | None:
        """The file that blocks a distribution, if any does."""
        same = canonical(distribution)
        return next((f for n, f in self.blocked.items() if canonical(n) == same), None)

    def blocks_component(self, kind: str, name: str) -> str | None:
        """The file that blocks a component, if any does."""
        return self.blocked.get(f"{kind}/{name}")


def load_manifest(files: Sequence[Path] | None = None) -> Manifest:
    """The manifest of ``files``, later ones overriding; by default shipped, user's, project's.

    Raises ConfigError with the problems of all files.
    """
    kinds: dict[str, Kind] = {}
    components: dict[tuple[str, str], Known] = {}
    prefer: dict[tuple[str, str], str] = {}
    blocked: dict[str, str] = {}
    problems: list[Problem] = []
    for file in manifest_files() if files is None else files:
        table = read_toml(file)
        try:
            policy = read_table(_Policy, table, "registry.toml")
        except Invalid as error:
            problems += error.problems
            continue
        kinds |= policy.kinds
        problems += _unknown_kinds(table, policy, kinds)
        components |= _by_kind_and_name(policy.components)
        prefer |= _by_kind_and_name(policy.prefer)
        blocked |= {name: blocked.get(name, str(file)) for name in policy.blocked}
    if problems:
        raise ConfigError(problems)
    return Manifest(kinds, components, prefer, blocked)


def manifest_files() -> list[Path]:
    """The registry files that exist: shipped, then the user's, then the working directory's.

    A ``registry.toml`` in the working directory may belong to another program: it is taken for ours
    if it sets ``schema`` above its first table, whatever else is wrong with it, so that a slip in
    ours never drops a block in silence. Raises ConfigError for a file that cannot be looked at.
    """
    shipped, project = resource(_FILE), Path(_FILE)
    files = [shipped, *(file for file in _user_files() if _is_file(file))]
    # In a checkout of this repository the project's file is the shipped one.
    if _is_file(project) and not project.samefile(shipped) and _is_ours(project):
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


def canonical(distribution: str) -> str:
    """A distribution name as package indexes compare it: ``Blt_Acme`` is ``blt-acme``."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _by_kind_and_name(tables: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], Any]:
    return {(kind, name): item for kind, names in tables.items() for name, item in names.items()}


def _unknown_kinds(table: Table, policy: _Policy, kinds: Mapping[str, Kind]) -> list[Problem]:
    def problem(section: str, kind: str) -> Problem:
        text = f"no kind named {kind!r}.{near_match(kind, kinds)}"
        return table.place_of(section).child(kind).problem(text, f"kinds: {', '.join(kinds)}")

    named = [("components", kind) for kind in policy.components]
    named += [("prefer", kind) for kind in policy.prefer]
    return [problem(section, kind) for section, kind in named if kind not in kinds]
