"""What verifications promise."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

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
from blt_core.testing.subject import Subject
from blt_core.types import Draft, Draws, Sampling

VERIFICATION = Contracts("verification")

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
