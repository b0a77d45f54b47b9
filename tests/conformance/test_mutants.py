"""The kit tells broken components from whole ones, by the contract that they break."""

from __future__ import annotations

import pytest

from blt_core.errors import PluginError
from blt_core.plugins.loading import load_plugins
from blt_core.testing import Profile, check_component, contracts_of
from blt_core.testing.contracts import ContractError
from tests.conformance import mutants_decoding, mutants_files, mutants_parts
from tests.nightly import nightly_or

MODULES = [mutants_parts, mutants_decoding, mutants_files]
PLUGINS = load_plugins(
    extra=[("blt-mutants", module.__name__.rpartition(".")[2], module) for module in MODULES]
)
FAULTS = {kind: faults for module in MODULES for kind, faults in module.FAULTS.items()}
#: Examples of each contract: enough to find every fault; generations take longer than passes.
EXAMPLES = nightly_or(6, 12)
OF_KIND = nightly_or({"sampler": 4, "drafter": 4}, {})
#: A nightly run tries each fault on three models and three sets of examples.
SEEDS = nightly_or((0,), (0, 1, 2))

#: Contracts of all kinds, and those that hold what others have caught before.
GENERAL = (".builds", ".defaults", ".described", ".engine")
NO_FAULT = ["drafter.identical", "patcher.saved", "unmasking.fills"]


def profile(kind, seed=0):
    """Failing examples need not be made small here."""
    return Profile(OF_KIND.get(kind, EXAMPLES), shrinks=False, seed=seed)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_component_without_a_fault_passes(kind):
    check_component(kind, "broken/it", {}, plugins=PLUGINS, profile=profile(kind))


@pytest.mark.parametrize(
    ("kind", "fault", "contract"),
    [(kind, fault, each) for kind, faults in FAULTS.items() for fault, each in faults.items()],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_fault_is_found_under_its_contract(kind, fault, contract, seed):
    table, options = {"fault": fault}, {"plugins": PLUGINS, "seed": seed}
    with pytest.raises(ContractError) as found:
        check_component(kind, "broken/it", table, profile=profile(kind, seed), **options)
    assert found.value.contract == f"{kind}.{contract}", str(found.value)


def test_an_unknown_component_is_no_broken_contract():
    with pytest.raises(PluginError):
        check_component("patcher", "broken/that", plugins=PLUGINS)


def test_every_kind_has_contracts_and_faults():
    kinds = set(PLUGINS.manifest.kinds)
    assert kinds == FAULTS.keys()
    assert all(len(faults) >= 2 for faults in FAULTS.values())
    assert sum(map(len, FAULTS.values())) >= 40
    for kind, faults in FAULTS.items():
        names = {each.name for each in contracts_of(kind, PLUGINS)}
        assert {f"{kind}.{each}" for each in faults.values()} <= names


def test_most_contracts_are_shown_to_catch_something():
    caught = {f"{kind}.{each}" for kind, faults in FAULTS.items() for each in faults.values()}
    tried = {c.name for kind in FAULTS for c in contracts_of(kind, PLUGINS)}
    idle = sorted(name for name in tried - caught if not name.endswith(GENERAL))
    assert idle == sorted(NO_FAULT)
