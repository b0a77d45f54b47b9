"""Running the contracts of a kind on a component."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from blt_core.component import Kind
from blt_core.errors import PluginError
from blt_core.plugins.loading import Plugins, load_plugins
from blt_core.testing.contracts import (
    PROFILES,
    Contract,
    Contracts,
    Profile,
    ProfileName,
    Result,
    try_contract,
)
from blt_core.testing.kinds.components import COMMON
from blt_core.testing.subject import Subject


def contracts_of(kind: str, plugins: Plugins | None = None) -> tuple[Contract, ...]:
    """The contracts of a kind, in the order in which they are tried.

    Those that every component has come first. Raises PluginError for a kind that is not declared,
    or that names no contracts.
    """
    plugins = plugins or load_plugins()
    if kind not in plugins.manifest.kinds:
        known = ", ".join(plugins.manifest.kinds)
        raise PluginError(f"there is no kind {kind!r}", (f"kinds: {known}",))
    declared: Kind = plugins.manifest.kinds[kind]
    if not declared.contracts:
        raise PluginError(
            f"the kind {kind!r} names no contracts",
            ('fix: Kind(…, contracts="package.module:NAME"), of blt_core.testing',),
        )
    module, _, name = declared.contracts.partition(":")
    try:
        own = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        text = f"the contracts of {kind!r} cannot be imported: {error}"
        raise PluginError(text, ("they need: pip install 'blt-core[testing]'",)) from error
    if not isinstance(own, Contracts):
        raise PluginError(f"{declared.contracts} is {own!r}; expected Contracts")
    return (*(each.of(kind) for each in COMMON), *own)


def subject_of(
    kind: str,
    name: str,
    table: Mapping[str, Any] | None = None,
    plugins: Plugins | None = None,
    seed: int = 0,
) -> Subject:
    """A component under test. Raises PluginError for a name that nothing supplies."""
    plugins = plugins or load_plugins()
    plugins.registry.lookup(kind, name)
    return Subject(kind, name, dict(table or {}), plugins, seed)


def profile_of(profile: ProfileName | Profile) -> Profile:
    """A profile by its name, or by how many examples it tries: ``"5"``."""
    if isinstance(profile, Profile):
        return profile
    if profile.isdecimal() and int(profile):
        return Profile(int(profile))
    if profile not in PROFILES:
        raise PluginError(
            f"no profile {profile!r}; expected {', '.join(PROFILES)}, or a number of examples"
        )
    return PROFILES[profile]


def try_component(
    kind: str,
    name: str,
    table: Mapping[str, Any] | None = None,
    *,
    plugins: Plugins | None = None,
    profile: ProfileName | Profile = "dev",
    seed: int = 0,
    only: Collection[str] = (),
) -> Iterator[Result]:
    """How each contract of the kind goes for a component, as :func:`check_component` says.

    only: names of contracts; without any, all. A component that cannot be built is tried no
    further. Raises PluginError, before any is tried, for a name that is no contract's.
    """
    tried, subject = profile_of(profile), subject_of(kind, name, table, plugins, seed)
    contracts = _chosen(contracts_of(kind, plugins), kind, only)
    return _try_all(contracts, subject, tried)


def _chosen(contracts: Sequence[Contract], kind: str, only: Collection[str]) -> Sequence[Contract]:
    if not only:
        return contracts
    names = {name if "." in name else f"{kind}.{name}" for name in only}
    known = {contract.name for contract in contracts}
    for name in sorted(names - known):
        close = difflib.get_close_matches(name, known, 1)
        hint = (f"Did you mean {close[0]!r}?",) if close else ()
        raise PluginError(f"{kind} has no contract {name!r}", (*hint, f"all: blt docs {kind}"))
    return [contract for contract in contracts if contract.name in names]


def _try_all(contracts: Sequence[Contract], subject: Subject, tried: Profile) -> Iterator[Result]:
    for contract in contracts:
        result = try_contract(contract, subject, tried)
        yield result
        if not result.passed and contract.name.endswith(".builds"):
            return


def check_component(
    kind: str,
    name: str,
    table: Mapping[str, Any] | None = None,
    *,
    plugins: Plugins | None = None,
    profile: ProfileName | Profile = "dev",
    seed: int = 0,
) -> list[Result]:
    """Try a component on every contract of its kind, from its entry point and a TOML table.

    table: the keys of its table, without ``use``; sizes that a model's parts must agree on may be
    left out. plugins: those to find it among (default: what is installed;
    ``load_plugins(extra=[("acme", "acme", module)])`` for what is not). profile: "dev" is quick,
    "ci" tries more, the same each time, "nightly" most, new each time.

    Raises ContractError at the first contract that it breaks, PluginError for a name that nothing
    supplies. Gives how each contract went.
    """
    results = []
    for result in try_component(kind, name, table, plugins=plugins, profile=profile, seed=seed):
        if result.error is not None:
            raise result.error
        results.append(result)
    return results
