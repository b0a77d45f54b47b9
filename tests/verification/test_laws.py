"""Rejection and block verification have the model's own law: all outcomes are summed up.

Tiny alphabets, random laws p of the model and q of the drafter that depend on the whole text, and
several rounds, so that what a round leaves to the next is in the sum.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from blt_core.types import Sampling
from blt_plugins.verification.laws import block, rejection

IDS, BYTES = 3, 5
#: The id at which drafters stop, as they do at EOS.
LAST = 2
LAWS = {"rejection": rejection, "block": block}
SAMPLINGS = {
    "plain": Sampling(1.0),
    "hot": Sampling(2.5),
    "top-k": Sampling(0.7, top_k=2),
    "top-p": Sampling(1.3, top_p=0.8),
    "both": Sampling(1.0, top_k=2, top_p=0.9),
}


class Chains:
    """Random laws of the next id after any text, as logits through one sampling for p and q."""

    def __init__(self, seed: int, sampling: Sampling, *, sharp: float) -> None:
        self._seed, self._sampling, self._sharp = seed, sampling, sharp
        self._found: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def probs(self, who: str, text: tuple[int, ...]) -> Tensor:
        if (who, text) not in self._found:
            rng = torch.Generator().manual_seed(hash((self._seed, who == "p", text)) % 2**31)
            logits = self._sharp * torch.randn(IDS, generator=rng, dtype=torch.float64)
            self._found[who, text] = self._sampling.probabilities(logits)
        return self._found[who, text]


def drafts(chains, text, most, bound):
    """Every draft after ``text`` with its probability; none goes on after LAST or below a bound.

    bound: on the product of top probabilities, as the drafter ``until`` has it.
    """
    found = []

    def grow(ids, probability, sure):
        q = chains.probs("q", (*text, *ids))
        sure *= float(q.max())
        if len(ids) == most or ids[-1:] == (LAST,) or sure < bound:
            found.append((ids, probability))
            return
        for token in range(IDS):
            if q[token] > 0:
                grow((*ids, token), probability * float(q[token]), sure)

    grow((), 1.0, 1.0)
    return found


def joint_law(chains, law, most, bound):
    """The law of the first BYTES ids of verified sampling, round after round."""
    done = defaultdict(float)
    open_texts = {(): 1.0}
    while open_texts:
        text, reached = open_texts.popitem()
        for ids, probability in drafts(chains, text, most, bound):
            places = [(*text, *ids[:j]) for j in range(len(ids) + 1)]
            p = torch.stack([chains.probs("p", place) for place in places])
            q = [chains.probs("q", place) for place in places[:-1]]
            q_kV = torch.stack(q) if q else torch.zeros(0, IDS, dtype=torch.float64)
            stands, following = law(ids, q_kV, p)
            assert float(stands.sum()) == pytest.approx(1, abs=1e-12)
            for j, token in itertools.product(range(len(ids) + 1), range(IDS)):
                mass = reached * probability * float(stands[j] * following[j, token])
                if mass:
                    new = (*places[j], token)
                    into = open_texts if len(new) < BYTES else done
                    into[new[:BYTES]] = into.get(new[:BYTES], 0.0) + mass
    return done


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("most", "bound"), [(1, 0.0), (2, 0.0), (3, 0.0), (3, 0.35)])
def test_the_joint_law_of_several_rounds_is_the_model_s(name, sampling, most, bound):
    for seed, sharp in ((0, 1.0), (1, 3.0)):
        chains = Chains(seed, SAMPLINGS[sampling], sharp=sharp)
        found = joint_law(chains, LAWS[name], most, bound)
        for text in itertools.product(range(IDS), repeat=BYTES):
            wanted = math.prod(float(chains.probs("p", text[:i])[text[i]]) for i in range(BYTES))
            assert found.get(text, 0.0) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("most", [2, 3])
def test_block_verification_accepts_no_less_than_rejection(most):
    chains = Chains(3, Sampling(1.0), sharp=1.0)

    def accepted(law):
        total = 0.0
        for ids, probability in drafts(chains, (), most, 0.0):
            p = torch.stack([chains.probs("p", ids[:j]) for j in range(len(ids) + 1)])
            q = torch.stack([chains.probs("q", ids[:j]) for j in range(len(ids))])
            stands = law(ids, q, p).stands_j
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
