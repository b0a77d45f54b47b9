"""What drafters promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from hypothesis import strategies as st

from blt_core.decoding.drafting import propose
from blt_core.decoding.state import DecodeState
from blt_core.errors import EngineError
from blt_core.protocols import Drafter
from blt_core.testing.contracts import Broken, Contracts, NotPromised, require, reseed
from blt_core.testing.kinds.texts import (
    GREEDY,
    WARM,
    in_law,
    in_turn,
    mixed,
    same_as_ar,
    seeds,
    verified,
)
from blt_core.testing.subject import Subject
from blt_core.types import Draft, Draws, Sampling

DRAFTER = Contracts("drafter")

#: Said where no draft was tried: contracts about drafts then hold, whatever the drafter does.
IDLE = "it proposed nothing in any example"

limits = st.lists(st.integers(0, 7), min_size=3, max_size=3)
asked = st.tuples(mixed, limits)


def _drafter(subject: Subject) -> Drafter:
    """The drafter, built anew beside the host model."""
    drafter: Drafter = verified(subject, drafter=subject.own_table).drafter  # type: ignore[attr-defined]
    return drafter


def _begun(subject: Subject, given: Sequence[bytes]) -> DecodeState:
    """A state whose prompts have been read, each with a byte after it."""
    model = subject.model
    state = DecodeState(model, [model.scheme.encode(each) for each in given], [40] * len(given))
    logits = state.next_logits([1] * len(given))
    state.append([[int(row.argmax())] for row in logits[:, 0]])
    state.settle()
    return state


def _asked(
    subject: Subject, drafter: Drafter, example: tuple[list[bytes], list[int]], sampling: Sampling
) -> tuple[Draft, DecodeState, list[int]]:
    """What a drafter proposes for a batch, the state after it, and the limits."""
    given, limit = example[0], example[1][: len(example[0])]
    if not any(limit):
        limit = [*limit[:-1], 1]
    state = _begun(subject, given)
    draft = drafter.draft(state, limit, sampling, Draws(tuple(range(len(given)))))
    return draft, state, limit


@DRAFTER.add(
    "keeps-text",
    "It may append to the texts, and never cuts or changes what was there.",
    lambda _: asked,
)
def _keeps(subject: Subject, example: tuple[list[bytes], list[int]]) -> None:
    given, limit = example[0], [max(n, 1) for n in example[1][: len(example[0])]]
    state = _begun(subject, given)
    state.commit()
    try:
        _drafter(subject).draft(state, limit, GREEDY, Draws(tuple(range(len(given)))))
    except EngineError as error:
        if "settled" in error.text:
            raise Broken(error.text) from error
    except Exception:  # noqa: BLE001, S110 -- the contract that it breaks comes later
        pass
    for row in range(len(given)):
        require(not state.rewritten(row), f"changed the text of batch row {row}")


@DRAFTER.add(
    "proposes",
    "It gives a `Draft` of as many batch rows, of ids of the scheme, at any temperature.",
    lambda _: asked,
    idle=IDLE,
)
def _proposes(subject: Subject, example: tuple[list[bytes], list[int]]) -> None:
    drafter = _drafter(subject)
    for sampling in (GREEDY, WARM):
        state = _begun(subject, example[0])
        limit = example[1][: len(example[0])]
        if not any(limit):
            continue
        draft = propose(drafter, state, limit, sampling, Draws(tuple(range(len(limit)))))
        if any(draft.ids):
            subject.exercised()


@DRAFTER.add(
    "limit",
    "It proposes at most `limit[b]` ids for row b, and none where that is 0.",
    lambda _: asked,
)
def _limit(subject: Subject, example: tuple[list[bytes], list[int]]) -> None:
    draft, _, limit = _asked(subject, _drafter(subject), example, GREEDY)
    for row, (ids, most) in enumerate(zip(draft.ids, limit, strict=True)):
        require(len(ids) <= most, f"proposed {len(ids)} ids for batch row {row}, of {most} asked")


@DRAFTER.add(
    "deterministic",
    "It proposes the same in any global random state: chance comes from `draws`.",
    lambda _: asked,
    share=0.5,
)
def _deterministic(subject: Subject, example: tuple[list[bytes], list[int]]) -> None:
    for sampling in (GREEDY, WARM):
        found = []
        for number in range(2):
            reseed(number)
            found.append(_asked(subject, _drafter(subject), example, sampling)[0].ids)
        require(found[0] == found[1], "proposes other ids in another global random state")


@DRAFTER.add(
    "batch",
    "What it proposes for a text does not depend on the others of the batch.",
    lambda _: asked,
    share=0.5,
)
def _batch(subject: Subject, example: tuple[list[bytes], list[int]]) -> None:
    for sampling in (GREEDY, WARM):
        together, _, limit = _asked(subject, _drafter(subject), example, sampling)
        for row, (each, most) in enumerate(zip(example[0], limit, strict=True)):
            if not most:
                continue
            state = _begun(subject, [each])
            alone = _drafter(subject).draft(state, [most], sampling, Draws((row,)))
            require(
                alone.ids[0] == together.ids[row],
                f"proposes other ids for batch row {row} than for the same text alone",
            )


@DRAFTER.add(
    "stateless",
    "Nothing is kept between calls but in attached caches: generations that take turns do not mix.",
    lambda _: mixed,
    share=0.2,
)
def _stateless(subject: Subject, example: list[bytes]) -> None:
    drafter = _drafter(subject)
    logs = []
    for given in (example, example[::-1]):
        recorded = _Recorded(drafter)
        sampler = _Verified(verified(subject, drafter=subject.own_table), recorded)
        in_turn(subject.model, sampler, given, WARM)
        logs.append(recorded)
    first = {text: ids for log in logs[:1] for text, ids in log.proposed}
    for text, ids in logs[1].proposed:
        require(
            first.get(text, ids) == ids,
            "what it proposes for a text depends on what it was asked before",
        )


@attrs.frozen(eq=False)
class _Recorded:
    """A drafter whose proposals are kept, each with the text that it was made for."""

    inner: Drafter
    proposed: list[tuple[tuple[tuple[int, ...], int], list[int]]] = attrs.field(factory=list)

    def draft(self, ops: Any, limit: Sequence[int], sampling: Sampling, draws: Draws) -> Draft:
        """What the inner one proposes."""
        texts = [tuple(ops.text(row)) for row in range(len(limit))]
        draft = self.inner.draft(ops, limit, sampling, draws)
        for text, most, ids in zip(texts, limit, draft.ids, strict=True):
            if most:
                self.proposed.append(((text, most), list(ids)))
        return draft


class _Verified:
    """A verified sampler with another drafter in it."""

    true_logits = True

    def __init__(self, sampler: Any, drafter: Drafter) -> None:
        sampler.drafter = drafter
        self._sampler = sampler

    def check(self, sampling: Sampling) -> None:
        """As the sampler's own."""
        self._sampler.check(sampling)

    def round(self, ops: Any, sampling: Sampling, draws: Draws) -> Any:
        """As the sampler's own."""
        return self._sampler.round(ops, sampling, draws)


@DRAFTER.add(
    "identical",
    "Verified, its drafts give `ar`'s bytes: what it leaves behind is rewound.",
    lambda _: st.tuples(mixed, seeds),
    share=0.4,
    idle=IDLE,
)
def _identical(subject: Subject, example: tuple[list[bytes], int]) -> None:
    sampler = verified(subject, drafter=subject.own_table)
    for sampling in (GREEDY, WARM):
        got = same_as_ar(subject.model, sampler, example[0], sampling, example[1])
        if any(record.drafted for record in got):
            subject.exercised()


@DRAFTER.add(
    "stops",
    "With the ability `stops_early` it asks the rule about each id, in order, with beliefs that "
    "sum to 1, drafts no more than it says, and asks no more about a row that has ended.",
    lambda _: st.tuples(asked, st.integers(0, 3)),
)
def _stops(subject: Subject, example: tuple[tuple[list[bytes], list[int]], int]) -> None:
    if not subject.can("stops_early"):
        raise NotPromised("it does not say stops_early")
    (given, limit), most = example
    limit = [max(n, 1) for n in limit[: len(given)]]
    told, ended = [0] * len(given), [False] * len(given)

    def rule(row: int, beliefs_kV: torch.Tensor) -> tuple[int, bool]:
        if ended[row]:
            raise Broken(f"asks again about batch row {row}, which has ended")
        size = subject.model.scheme.size
        if beliefs_kV.dim() != 2 or beliefs_kV.shape[1] != size:  # noqa: PLR2004 -- k, V
            raise Broken(f"asks with beliefs of shape {tuple(beliefs_kV.shape)}; not (k, {size})")
        sums = beliefs_kV.double().sum(-1)
        if not bool((sums - 1).abs().lt(1e-6).all()):
            raise Broken("asks with beliefs that do not sum to 1")
        kept = min(len(beliefs_kV), most - told[row])
        told[row] += kept
        ended[row] = kept < len(beliefs_kV) or told[row] >= most
        return kept, not ended[row]

    state = _begun(subject, given)
    draft = _drafter(subject).draft(  # type: ignore[call-arg]
        state, limit, GREEDY, Draws(tuple(range(len(given)))), rule
    )
    for row, ids in enumerate(draft.ids):
        # A drafter that holds the decoder may add a byte of the model's own, asked about or not.
        require(
            len(ids) <= told[row],
            f"drafted {len(ids)} ids for batch row {row}, where the rule let {told[row]} pass",
        )


@DRAFTER.add(
    "probabilities",
    "With the ability `gives_q`, its ids come with what they were drawn from: positive, summing to "
    "1, for each place.",
    lambda _: asked,
)
def _probabilities(subject: Subject, example: tuple[list[bytes], list[int]]) -> None:
    if not subject.can("gives_q"):
        raise NotPromised("it does not say gives_q")
    given, limit = example[0], [max(n, 1) for n in example[1][: len(example[0])]]
    state = _begun(subject, given)
    draws = Draws(tuple(range(len(given)))).of_round(state.lengths)
    draft = propose(_drafter(subject), state, limit, WARM, draws)
    for row in range(len(given)):
        probs = draft.probs(row, subject.model.scheme.size).double()
        require(
            bool((probs.sum(-1) - 1).abs().lt(1e-6).all()) and bool((probs >= 0).all()),
            f"the probabilities of batch row {row} do not sum to 1",
        )


@DRAFTER.add(
    "law",
    "With the ability `gives_q`, those are the laws that its ids are drawn from: verified by "
    "`rejection`, texts have the model's own law.",
)
def _law(subject: Subject, _: None) -> None:
    if not subject.can("gives_q"):
        raise NotPromised("it does not say gives_q")
    in_law(
        subject.model,
        verified(subject, drafter=subject.own_table, verification={"use": "rejection"}),
    )
