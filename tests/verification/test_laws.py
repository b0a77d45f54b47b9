"""Rejection and block verification have the model's own law: all outcomes are summed up.

Tiny alphabets, random laws p of the model and q of the drafter that depend on the whole text, and
several rounds, so that what a round leaves to the next is in the sum.
"""

from __future__ import annotations

import pytest
import torch

from blt_core.testing.laws import Chains, drafts, joint_law
from blt_core.types import Sampling
from blt_plugins.verification.laws import block, rejection
from tests.nightly import nightly_or

BYTES = 5
LAWS = {"rejection": rejection, "block": block}
SAMPLINGS = {
    "plain": Sampling(1.0),
    "hot": Sampling(2.5),
    "top-k": Sampling(0.7, top_k=2),
    "top-p": Sampling(1.3, top_p=0.8),
    "both": Sampling(1.0, top_k=2, top_p=0.9),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("most", "bound"), [(1, 0.0), (2, 0.0), (3, 0.0), (3, 0.35)])
def test_the_joint_law_of_several_rounds_is_the_model_s(name, sampling, most, bound):
    for seed, sharp in nightly_or(((1, 3.0),), ((0, 1.0), (1, 3.0))):
        chains = Chains(seed, SAMPLINGS[sampling], sharp=sharp)
        found = joint_law(chains, LAWS[name], size=BYTES, most=most, bound=bound)
        for text, wanted in chains.model(BYTES):
            assert found.get(text, 0.0) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("most", [2, 3])
def test_block_verification_accepts_no_less_than_rejection(most):
    chains = Chains(3, Sampling(1.0), sharp=1.0)

    def accepted(law):
        total = 0.0
        for ids, probability in drafts(chains, (), most):
            stands = law(ids, *chains.given((), ids)).stands_j
            total += probability * float((stands * torch.arange(len(ids) + 1)).sum())
        return total

    assert accepted(block) > accepted(rejection) > 0


def test_a_point_mass_is_verified_too():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)
    for law in LAWS.values():
        stands, following = law([1], torch.eye(3, dtype=torch.float64)[[1]], p)
        assert stands.tolist() == pytest.approx([0.7, 0.3])
        assert following[0].tolist() == pytest.approx([0.5 / 0.7, 0.0, 0.2 / 0.7])
        assert following[1].tolist() == pytest.approx(p[1].tolist())


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_drafts_of_one_length_are_judged_together_as_one_by_one(name, count):
    chains, law = Chains(5, Sampling(1.3), sharp=2.0), LAWS[name]
    several = [ids for ids, _ in drafts(chains, (0,), 3) if len(ids) == count] or [()]
    q_bkV, p_bjV = map(torch.stack, zip(*(chains.given((0,), ids) for ids in several), strict=True))
    together = law(torch.tensor(several, dtype=torch.long), q_bkV, p_bjV)
    for row, ids in enumerate(several):
        alone = law(ids, q_bkV[row], p_bjV[row])
        assert torch.allclose(together.stands_j[row], alone.stands_j, atol=1e-15)
        assert torch.allclose(together.next_jV[row], alone.next_jV, atol=1e-15)
        assert float(alone.stands_j.sum()) == pytest.approx(1.0, abs=1e-14)
