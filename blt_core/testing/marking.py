"""Contracts as tests of pytest, one for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs
import pytest

from blt_core.plugins.loading import Plugins
from blt_core.testing.contracts import Contract, Profile, Result, try_contract
from blt_core.testing.kit import contracts_of, profile_of, subject_of
from blt_core.testing.subject import Subject

T = TypeVar("T", bound=Callable[..., object])


@attrs.frozen(eq=False)
class Trial:
    """A contract to be tried on a component; what a test marked by :func:`conformance` gets.

    profile: what the test asks for; None leaves it to the run (``--blt-profile``).
    """

    contract: Contract
    subject: Subject
    profile: Profile | None = None

    def run(self, profile: Profile | None = None) -> Result:
        """Try it. Raises ContractError if the component breaks it; skips what it does not promise.

        profile: for a trial that has none of its own (default: "dev").
        """
        result = try_contract(
            self.contract, self.subject, self.profile or profile or profile_of("dev")
        )
        if result.error is not None:
            raise result.error
        if result.skipped:
            pytest.skip(result.skipped)
        return result


def conformance(
    kind: str,
    name: str,
    table: Mapping[str, Any] | None = None,
    *,
    plugins: Plugins | None = None,
    profile: str | Profile | None = None,
    known: Mapping[str, str] | None = None,
) -> Callable[[T], T]:
    """Make of a test function one test for each contract of a component.

    >>> @conformance("drafter", "acme/echo", {"draft_bytes": 4})  # doctest: +SKIP
    ... def test_echo(contract):
    ...     contract()

    table, plugins: as for :func:`blt_core.testing.check_component`. profile: "dev", "ci" or
    "nightly"; without it pytest's ``--blt-profile`` says. known: contracts that are known to be
    broken, with the reason of each: they must fail, and the tests say so if they no longer do.
    Raises PluginError for names that are not there, and for a known one that is no contract.
    """
    from blt_core.errors import PluginError

    subject, contracts = subject_of(kind, name, table, plugins), contracts_of(kind, plugins)
    known = dict(known or {})
    if strange := known.keys() - {each.name for each in contracts}:
        names = ", ".join(each.name for each in contracts)
        raise PluginError(f"known: {min(strange)!r} is no contract", (f"contracts: {names}",))
    asked = None if profile is None else profile_of(profile)  # type: ignore[arg-type]
    cases = [
        pytest.param(
            Trial(each, subject, asked),
            id=each.name,
            marks=[pytest.mark.xfail(reason=known[each.name], strict=True)]
            if each.name in known
            else [],
        )
        for each in contracts
    ]

    def marked(function: T) -> T:
        parametrized = pytest.mark.parametrize("contract", cases, indirect=True)(function)
        return pytest.mark.blt_conformance(kind=kind, name=name)(parametrized)  # type: ignore[no-any-return]

    return marked
