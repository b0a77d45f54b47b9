"""Laws of verified sampling, summed up exactly: no draw is taken.

Tiny alphabets and random laws p of the model and q of the drafter that depend on the whole text;
all drafts and outcomes of several rounds, so that what a round leaves to the next is in the sum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from blt_core.types import AcceptanceLaw, Sampling

#: Ids of the alphabet; the last one ends a draft, as EOS does.
IDS = 3

#: law(ids, q_kV, p_jV), with k + 1 rows of p.
DraftLaw: TypeAlias = Callable[[Sequence[int], Tensor, Tensor], AcceptanceLaw]
Ids: TypeAlias = tuple[int, ...]


class Chains:
    """Random laws of the next id after any text: "p" of the model, "q" of the drafter.

    sharp: how far apart the logits are, before ``sampling`` makes probabilities of them.
    """

    def __init__(self, seed: int, sampling: Sampling, *, sharp: float) -> None:
        self._seed, self._sampling, self._sharp = seed, sampling, sharp
        self._found: dict[tuple[str, Ids], Tensor] = {}

    def probs(self, who: str, text: Ids) -> Tensor:
        """(V,): the law of the id after ``text``."""
        if (who, text) not in self._found:
            rng = torch.Generator().manual_seed(hash((self._seed, who == "p", text)) % 2**31)
            logits = self._sharp * torch.randn(IDS, generator=rng, dtype=torch.float64)
            self._found[who, text] = self._sampling.probabilities(logits)
        return self._found[who, text]

    def given(self, text: Ids, ids: Ids) -> tuple[Tensor, Tensor]:
        """(q_kV, p_jV) of a draft after ``text``."""
        places = [(*text, *ids[:j]) for j in range(len(ids) + 1)]
        q = [self.probs("q", place) for place in places[:-1]]
        q_kV = torch.stack(q) if q else torch.zeros(0, IDS, dtype=torch.float64)
        return q_kV, torch.stack([self.probs("p", place) for place in places])

    def model(self, size: int) -> Iterator[tuple[Ids, float]]:
        """Every text of ``size`` ids with the model's own probability."""
        for text in itertools.product(range(IDS), repeat=size):
            places = range(size)
            yield text, math.prod(float(self.probs("p", text[:i])[text[i]]) for i in places)


def drafts(chains: Chains, text: Ids, most: int, bound: float = 0.0) -> list[tuple[Ids, float]]:
    """Every draft of up to ``most`` ids after ``text``, with its probability.

    bound: on the product of top probabilities, below which a draft ends (the drafter ``until``).
    """
    found: list[tuple[Ids, float]] = []

    def grow(ids: Ids, probability: float, sure: float) -> None:
        q = chains.probs("q", (*text, *ids))
        sure *= float(q.max())
        if len(ids) == most or ids[-1:] == (IDS - 1,) or sure < bound:
            found.append((ids, probability))
            return
        for token in range(IDS):
            if q[token] > 0:
                grow((*ids, token), probability * float(q[token]), sure)

    grow((), 1.0, 1.0)
    return found


def joint_law(
    chains: Chains, law: DraftLaw, *, size: int, most: int, bound: float = 0.0
) -> dict[Ids, float]:
    """The law of the first ``size`` ids of verified sampling, round after round."""
    done: dict[Ids, float] = {}
    open_texts: dict[Ids, float] = {(): 1.0}
    while open_texts:
        text, reached = open_texts.popitem()
        for ids, probability in drafts(chains, text, most, bound):
            stands, following = law(ids, *chains.given(text, ids))
            outcomes = (stands[:, None] * following).tolist()
            for j, token in itertools.product(range(len(ids) + 1), range(IDS)):
                mass = reached * probability * outcomes[j][token]
                if mass:
                    new = (*text, *ids[:j], token)
                    into = open_texts if len(new) < size else done
                    into[new[:size]] = into.get(new[:size], 0.0) + mass
    return done
