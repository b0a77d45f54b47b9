"""What verifications promise."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from blt_core.decoding.drafting import verify
from blt_core.errors import RequestError
from blt_core.protocols import Verification
from blt_core.testing.contracts import Contracts, NotPromised, require, reseed
from blt_core.testing.kinds.texts import (
    GREEDY,
    WARM,
    in_law,
    mixed,
    same_as_ar,
    seeds,
    verified,
)
from blt_core.testing.laws import Chains, DraftLaw, joint_law
from blt_core.testing.subject import Subject
from blt_core.types import AcceptanceLaw, Draft, Draws, Sampling

VERIFICATION = Contracts("verification")

#: Bytes whose joint law is summed up: at least two rounds of drafts of up to EXACT_DRAFT ids.
EXACT_BYTES = 4
EXACT_DRAFT = 2
EXACT_ERROR = 1e-12
#: Drafts and decisions about each that are counted, and how far off the counts may be.
FOLLOWED = 3
DECISIONS = 1000
DECISION_SIGMAS = 6.1

#: Ids of the drafts that verifications are asked about directly.
SIZE = 7
drafts = st.tuples(
    st.lists(st.lists(st.integers(0, SIZE - 1), max_size=4), min_size=2, max_size=3),
    st.integers(0, 1000),
    st.integers(0, 2),
)


def _served(subject: Subject) -> list[Sampling]:
    verification, served = subject.build(), []
    for sampling in (GREEDY, WARM):
        try:
            verification.check(sampling)
        except RequestError:
            continue
        served.append(sampling)
    return served


def _question(example: tuple[list[list[int]], int, int]) -> tuple[Any, ...]:
    """(draft, logits, positions, active, draws) of an example."""
    rows, seed, idle = example
    generator = torch.Generator().manual_seed(seed)
    active = [index != idle for index in range(len(rows))]
    rows = [ids if on else [] for ids, on in zip(rows, active, strict=True)]
    longest = max(map(len, rows)) + 1
    logits = 2 * torch.randn(len(rows), longest, SIZE, generator=generator, dtype=torch.float64)
    probs = torch.randn(len(rows), longest, SIZE, generator=generator, dtype=torch.float64)
    draft = Draft(rows, probs.softmax(-1))
    positions = [5 + 3 * index for index in range(len(rows))]
    return draft, logits, positions, active, Draws(tuple(range(seed, seed + len(rows))))


def _ask(verification: Verification, example: Any, sampling: Sampling) -> Any:
    draft, logits, positions, active, draws = _question(example)
    if getattr(verification, "draws_of_round", False):
        draws = draws.of_round(positions)
    return verify(verification, draft, logits, positions, active, sampling, draws)


@VERIFICATION.add(
    "check",
    "`check` gives nothing; it refuses a setting by RequestError, and serves at least one.",
)
def _check(subject: Subject, _: None) -> None:
    verification, served = subject.build(), 0
    for sampling in (GREEDY, WARM, Sampling(0.5, top_k=3), Sampling(2.0, top_p=0.5)):
        try:
            found = verification.check(sampling)
        except RequestError:
            continue
        require(found is None, f"check gave {found!r}; it refuses a setting by RequestError")
        served += 1
    require(served, "check refuses every setting")


@VERIFICATION.add(
    "decides",
    "It gives a count for each batch row, up to the draft's length, and the id after it; 0 and -1 "
    "for rows that take no part.",
    lambda _: drafts,
)
def _decides(subject: Subject, example: Any) -> None:
    for sampling in _served(subject):
        accepted, own = _ask(subject.build(), example, sampling)
        _, _, _, active, _ = _question(example)
        for row, on in enumerate(active):
            if not on:
                require(
                    (accepted[row], own[row]) == (0, -1),
                    f"decided {accepted[row]} and {own[row]} for row {row}, which takes no part",
                )
            else:
                require(0 <= own[row] < SIZE, f"the id after row {row}'s draft is {own[row]}")


@VERIFICATION.add(
    "deterministic",
    "It decides the same in any global random state: chance comes from `draws`.",
    lambda _: drafts,
)
def _deterministic(subject: Subject, example: Any) -> None:
    for sampling in _served(subject):
        found = []
        for number in range(2):
            reseed(number)
            found.append(_ask(subject.build(), example, sampling))
        require(found[0] == found[1], "decides otherwise in another global random state")


@VERIFICATION.add(
    "batch",
    "What it decides for a text does not depend on the others of the batch.",
    lambda _: drafts,
)
def _batch(subject: Subject, example: Any) -> None:
    for sampling in _served(subject):
        verification = subject.build()
        accepted, own = _ask(subject.build(), example, sampling)
        draft, logits, positions, active, draws = _question(example)
        for row, on in enumerate(active):
            if not on:
                continue
            ids, own_draws = draft.ids[row], Draws((draws.seeds[row],))
            if getattr(verification, "draws_of_round", False):
                own_draws = own_draws.of_round([positions[row]])
            one = Draft([ids], draft.probs_bkV[row : row + 1, : len(ids)])
            alone = verify(
                subject.build(),
                one,
                logits[row : row + 1, : len(ids) + 1],
                [positions[row]],
                [True],
                sampling,
                own_draws,
            )
            require(
                alone == ([accepted[row]], [own[row]]),
                f"decides otherwise for batch row {row} than for the same draft alone",
            )


@VERIFICATION.add(
    "stateless",
    "Nothing is kept between calls: what it decides does not depend on what it was asked before.",
    lambda _: st.lists(drafts, min_size=2, max_size=3),
)
def _stateless(subject: Subject, example: list[Any]) -> None:
    verification = subject.build()
    for sampling in _served(subject):
        found = [_ask(verification, each, sampling) for each in example]
        again = [_ask(verification, each, sampling) for each in example[::-1]]
        require(found == again[::-1], "decides otherwise after other questions")


@VERIFICATION.add(
    "identical",
    "Without `draws_of_round`, texts are `ar`'s, seed for seed, whatever is drafted; with it, "
    "greedy ones are.",
    lambda _: st.tuples(mixed, seeds),
)
def _identical(subject: Subject, example: tuple[list[bytes], int]) -> None:
    in_own_law = getattr(subject.build(), "draws_of_round", False)
    sampler = verified(
        subject, drafter={"use": "self", "draft_bytes": 4}, verification=subject.own_table
    )
    for sampling in _served(subject):
        if sampling.greedy or not in_own_law:
            same_as_ar(subject.model, sampler, example[0], sampling, example[1])


@VERIFICATION.add("law", "With `draws_of_round`, texts have the model's own joint law.")
def _law(subject: Subject, _: None) -> None:
    if not getattr(subject.build(), "draws_of_round", False):
        raise NotPromised("it does not say draws_of_round")
    sampler = verified(
        subject, drafter={"use": "self", "draft_bytes": 2}, verification=subject.own_table
    )
    in_law(subject.model, sampler)


@VERIFICATION.add(
    "exact",
    "With `law`, several rounds of it sum up to the model's own joint law, to 1e-12.",
    lambda _: st.tuples(
        st.integers(0, 1000),
        st.sampled_from([1.0, 3.0]),
        st.sampled_from([Sampling(1.0), Sampling(0.7, top_k=2)]),
    ),
)
def _exact(subject: Subject, example: tuple[int, float, Sampling]) -> None:
    law, (seed, sharp, sampling) = _law_of(subject), example
    chains = Chains(seed, sampling, sharp=sharp)
    found = joint_law(chains, law, size=EXACT_BYTES, most=EXACT_DRAFT)
    for text, wanted in chains.model(EXACT_BYTES):
        require(
            abs(found.get(text, 0.0) - wanted) <= EXACT_ERROR,
            f"a text of {list(text)} has probability {found.get(text, 0.0):.6f} by its law, "
            f"{wanted:.6f} by the model's",
        )


@VERIFICATION.add(
    "follows",
    "With `law`, `accept` decides as often as its law says.",
)
def _follows(subject: Subject, _: None) -> None:
    for seed in range(FOLLOWED):
        _decides_by_its_law(subject, seed)


def _decides_by_its_law(subject: Subject, seed: int) -> None:
    law, verification, sampling = _law_of(subject), subject.build(), Sampling(1.0)
    generator = torch.Generator().manual_seed(seed)
    logits, q = torch.randn(2, 3, SIZE, generator=generator, dtype=torch.float64)
    q_kV, ids = q[:2].softmax(-1), torch.randint(SIZE, (2,), generator=generator).tolist()
    stands, following = law(ids, q_kV, sampling.probabilities(logits))
    draft = Draft([ids] * DECISIONS, q_kV.expand(DECISIONS, -1, -1))
    positions = [5] * DECISIONS
    draws = Draws(tuple(range(DECISIONS))).of_round(positions)
    rows = logits.expand(DECISIONS, -1, -1)
    decided = verify(verification, draft, rows, positions, [True] * DECISIONS, sampling, draws)
    counts = Counter(zip(*decided, strict=True))
    for kept in range(3):
        for token in range(SIZE):
            probability = min(max(float(stands[kept] * following[kept, token]), 0.0), 1.0)
            spread = math.sqrt(DECISIONS * probability * (1 - probability)) + 1
            found, wanted = counts[kept, token], DECISIONS * probability
            require(
                abs(found - wanted) <= DECISION_SIGMAS * spread,
                f"of {DECISIONS} decisions about {ids}, {found} keep {kept} ids and put {token} "
                f"after them; its law has {wanted:.1f}",
            )


def _law_of(subject: Subject) -> DraftLaw:
    """A verification's law, that gives what it must; NotPromised where there is none."""
    law = getattr(subject.build(), "law", None)
    if law is None:
        raise NotPromised("it has no law")

    def checked(ids: Sequence[int], q_kV: Tensor, p_jV: Tensor) -> AcceptanceLaw:
        stands, following = law(ids, q_kV, p_jV)
        shapes = [tuple(stands.shape), tuple(following.shape)]
        wanted = [(len(ids) + 1,), (len(ids) + 1, p_jV.shape[-1])]
        require(shapes == wanted, f"law gave shapes {shapes} for {len(ids)} ids; wanted {wanted}")
        return AcceptanceLaw(stands, following)

    return checked
