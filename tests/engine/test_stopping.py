"""Drafts that end early: where the rule says so, and with no pass after it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_core.decoding.engine import Request
from blt_core.types import Draft
from tests.engine import models
from tests.engine.drafters import Recorded
from tests.engine.runs import (
    Traced,
    first_drafter,
    run,
    self_drafter,
    speculative,
    until_drafter,
)
from tests.engine.seen import saw
from tests.engine.strategies import batches, examples, model_indices, samplings, stopping_drafters


class AtMost:
    """An inner drafter whose rule lets ``count`` ids of each row through, and keeps what it saw.

    whole: it keeps those that it is asked about in one go, and then ends the row.
    """

    def __init__(self, inner, count, *, whole):
        self.inner, self.count, self.whole = inner, count, whole
        self.asked: list[list[list[torch.Tensor]]] = []

    def draft(self, ops, limit, sampling, draws):
        left, asked = [self.count] * len(limit), [[] for _ in limit]
        over = [False] * len(limit)
        self.asked.append(asked)

        def rule(row, beliefs_kV):
            assert not over[row], "asked again after its end"
            going = len(beliefs_kV) if self.whole else min(left[row], len(beliefs_kV))
            asked[row] += list(beliefs_kV)
            left[row] -= going
            over[row] = left[row] <= 0 if self.whole else going < len(beliefs_kV)
            return going, not over[row]

        return self.inner.draft(ops, limit, sampling, draws, rule)


@examples(100)
@given(st.data(), model_indices, samplings, st.integers(0, 6), st.booleans())
def test_a_stopped_draft_is_the_beginning_of_the_whole_one(data, index, sampling, count, keeps):
    batch = data.draw(batches(index, stops=False, sampling=sampling))
    inner = data.draw(stopping_drafters(index, learning=False))
    whole = Recorded(inner)
    run(models.model(index), speculative(whole), batch, sampling)
    stopped, first = AtMost(inner, count, whole=keeps), []

    class Both:
        """Drafts stopped, then whole on the same text, which is what is proposed."""

        def draft(self, ops, limit, sampling, draws):
            begin = ops.lengths
            cut = stopped.draft(ops, limit, sampling, draws)
            ops.rewind(begin)
            all_of_it = inner.draft(ops, limit, sampling, draws)
            first.append((cut.ids, all_of_it.ids))
            return all_of_it

    run(models.model(index), speculative(Both()), batch, sampling)
    for (cut, all_of_it), asked in zip(first, stopped.asked, strict=True):
        for row, ids in enumerate(cut):
            assert ids == all_of_it[row][: len(ids)]
            assert keeps or len(ids) <= count
            least = min(count, len(all_of_it[row]))
            assert len(ids) == least or len(ids) < len(asked[row]) or (keeps and len(ids) > least)
            assert len(ids) <= len(asked[row])
            saw("stopped draft", len(ids) < len(all_of_it[row]))


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("bound", [0.0, 0.2, 0.6, 1.0])
def test_self_runs_no_pass_after_it_has_stopped(index, bound):
    most = 6
    recorded = Recorded(until_drafter(bound, self_drafter(most)))
    trace = Traced(speculative(recorded))
    [done] = run(models.model(index), trace, [Request(b"stops", 24)])
    passes, left, drafts = 1, 24 - len(trace.rounds[0][1].ids[0]), iter(recorded.drafts)
    for _, turn in trace.rounds[1:]:
        room = min(most, left - 1)
        draft = next(drafts)[0] if room else []
        ended = draft[-1:] == [models.model(index).scheme.eos]
        # The pass that shows that the next byte is unsure is the last one of the draft.
        passes += 1 + min(len(draft) + (not ended), room)
        left -= len(turn.ids[0])
    assert done.passes.decoder == passes


def test_a_bound_of_0_never_stops_and_one_above_all_probabilities_stops_at_once():
    drafts = {}
    for bound in (0.0, 1.0):
        recorded = Recorded(until_drafter(bound, self_drafter(5)))
        run(models.model(0), speculative(recorded), [Request(b"bounds", 20)])
        drafts[bound] = recorded.drafts
    assert {len(row) for draft in drafts[0.0][:-2] for row in draft} == {5}
    assert {len(row) for draft in drafts[1.0] for row in draft} == {0}


class Says:
    """Proposes fixed ids for some rows, and keeps for which rows it was asked."""

    def __init__(self, ids):
        self.ids, self.asked = ids, []

    def draft(self, ops, limit, sampling, draws):
        self.asked.append([most > 0 for most in limit])
        return Draft([ids if most else [] for ids, most in zip(self.ids, limit, strict=True)])


def test_the_first_drafter_that_proposes_for_a_row_wins_and_later_ones_are_not_asked():
    one, two, three = Says([[1, 2], [], []]), Says([[9], [3], []]), Says([[8], [8], [4]])
    recorded = Recorded(first_drafter([one, two, three]))
    run(models.model(0), speculative(recorded), [Request(bytes([n]), 3) for n in b"abc"])
    assert recorded.drafts[0] == [[1], [3], [4]], "cut to what remains less one"
    assert (one.asked[0], two.asked[0], three.asked[0]) == (
        [True, True, True],
        [False, True, True],
        [False, False, True],
    )
