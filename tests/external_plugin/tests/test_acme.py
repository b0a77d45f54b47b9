"""Each component keeps the contracts of its kind."""

from blt_core.testing import conformance


@conformance("drafter", "acme/tree", {"draft_bytes": 5, "depth": 3})
def test_tree(contract):
    contract()


@conformance("patcher", "acme/commas", {"max_patch_bytes": 5})
def test_commas(contract):
    contract()


@conformance("global_model", "acme/gru", {"layers": 2})
def test_gru(contract):
    contract()


@conformance("cost_model", "acme/energy")
def test_energy(contract):
    contract()
