"""Stop strings end an output like a search of the whole, which reads only its tail."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt_core.decoding.engine import Progress, Request, Text, decode, end
from blt_core.types import IdScheme
from tests.engine import models
from tests.engine.drafters import Oracle
from tests.engine.runs import GREEDY, ar, ar_alone, ar_ids, run, self_drafter, speculative
from tests.engine.strategies import batches, drafters, examples, model_indices, samplings

SCHEMES = [IdScheme(outputs_specials=True), IdScheme(4, 1, 2, 3, 260, outputs_specials=True)]
#: Two letters, so that stop strings overlap with one another and with themselves.
letters = st.sampled_from(b"ab")
words = st.lists(letters, min_size=1, max_size=4).map(bytes)
#: A letter, or now and then a special id.
symbols = st.integers(0, 19).map(lambda n: {0: "eos", 1: "bos", 2: "bos"}.get(n, b"ab"[n % 2]))


def grown(before, ids, scheme):
    """The progress of a row after a round that added ``ids``; texts are shared as in the engine."""
    before.text.ids += ids
    before.text.shown += scheme.decode(ids)
    length = before.length + len(ids)
    return attrs.evolve(before, length=length, shown=len(before.text.shown))


def brute(ids, stops, room, scheme):
    """The shortest beginning of ``ids`` at which a whole text would end, and why."""
    for count in range(room + 1):
        if count and any(scheme.decode(ids[:count]).endswith(stop) for stop in stops):
            return ids[:count], "stop"
        if count == room:
            return ids[:count], "length"
        if count == len(ids):
            return ids, None
        if ids[count] == scheme.eos:
            return ids[:count], "eos"
    raise AssertionError


@examples(300)
@given(
    st.sampled_from(SCHEMES),
    st.lists(symbols, min_size=1, max_size=24),
    st.lists(words, max_size=3),
    st.integers(1, 30),
    st.lists(st.integers(1, 9), min_size=24, max_size=24),
)
def test_any_rounds_end_where_a_search_of_the_whole_text_does(scheme, text, stops, room, sizes):
    ids = [
        scheme.byte_offset + each if isinstance(each, int) else getattr(scheme, each)
        for each in text
    ]
    progress, found, reason, rest = Progress(Request(b"", room, tuple(stops))), [], None, ids
    for size in sizes:
        if not rest or reason is not None:
            break
        kept, reason = end(progress, rest[:size], scheme)
        progress, rest = grown(progress, kept, scheme), rest[size:]
        found += kept
    assert (found, reason) == brute(ids, stops, room, scheme)
    assert (progress.ids, progress.output) == (tuple(found), scheme.decode(found))


class Counted(bytearray):
    """An output that counts what is read of it."""

    read = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        self.read += len(found) if isinstance(index, slice) else 1
        return found


def test_a_search_reads_no_more_of_the_output_than_one_byte_less_than_the_longest_stop():
    scheme, shown = SCHEMES[0], Counted(b"x" * 10_000)
    request = Request(b"", 20_000, (b"abcde", b"ab"))
    before = Progress(request, 10_000, text=Text([120] * 10_000, shown), shown=10_000)
    assert end(before, [97, 120], scheme) == ([97, 120], None)
    assert shown.read == 4
    assert end(attrs.evolve(before, request=Request(b"", 20_000)), [97], scheme) == ([97], None)
    assert shown.read == 4
    short = Progress(request, 1, text=Text([97], Counted(b"a")), shown=1)
    assert end(short, [98, 99], scheme) == ([98], "stop")


@pytest.mark.parametrize("stop", [(), (b"never seen",)])
def test_no_round_reads_the_whole_output(monkeypatch, stop):
    asked = []
    whole, tail = Progress.output.fget, Progress.tail
    monkeypatch.setattr(Progress, "output", property(lambda own: asked.append(None) or whole(own)))
    monkeypatch.setattr(
        Progress, "tail", lambda own, count: asked.append(count) or tail(own, count)
    )
    request = Request(b"a", 60, stop)
    steps = list(decode(models.model(0), speculative(self_drafter(4)), [request], GREEDY))
    assert len(steps) > 5
    assert set(asked) == ({len(stop[0]) - 1} if stop else set())


def talkative(request, step, least):
    """Models, ``step`` apart, whose greedy text has ``least`` bytes: EOS ends some at once."""
    found = [i for i in range(0, models.COUNT, step) if len(ar_alone(i, request).output) >= least]
    assert len(found) > 1
    return found


@pytest.mark.parametrize("index", talkative(Request(b"ab", 12), 5, 2))
def test_a_stop_string_that_begins_in_the_prompt_is_none(index):
    free = ar_alone(index, Request(b"ab", 12))
    crossing = b"b" + free.output[:1]
    request = Request(b"ab", 12, (crossing, b"ab"))
    for sampler in (ar(), speculative(self_drafter(5))):
        [got] = run(models.model(index), sampler, [request])
        at = min((free.output.find(s) for s in request.stop if s in free.output), default=None)
        assert got.output == (free.output if at is None else free.output[: at + 2])
        assert len(got.output) > 1  # the crossing alone would have ended it after one byte


@examples(80)
@given(st.data(), model_indices, st.one_of(st.just(GREEDY), samplings))
def test_no_more_is_accepted_than_is_drafted_and_output(data, index, sampling):
    batch = data.draw(batches(index, sampling=sampling))
    sampler = speculative(data.draw(drafters(index, batch, sampling)))
    drafted = [0] * len(batch)
    for step in decode(models.model(index), sampler, batch, sampling):
        for row, progress in enumerate(step.progress):
            assert 0 <= progress.accepted <= min(progress.drafted, len(progress.ids))
            drafted[row] += step.round.drafted[row]
    assert [progress.drafted for progress in step.progress] == drafted  # whole, whatever is cut


@pytest.mark.parametrize("index", talkative(Request(b"perfect ", 20), 3, 8))
@pytest.mark.parametrize("cut", ["stop", "length"])
def test_what_an_end_cuts_off_a_draft_is_drafted_and_not_accepted(index, cut):
    request = Request(b"perfect ", 20)
    free = ar_alone(index, request)
    drafter = Oracle({(0,): ar_ids(index, request)}, 6, errors=0.0, seed=0)
    if cut == "stop":
        request = attrs.evolve(request, stop=(free.output[3:5],))
    else:
        request = attrs.evolve(request, max_new_bytes=5)
    drafted = accepted = length = 0
    for step in decode(models.model(index), speculative(drafter), [request], GREEDY):
        [progress] = step.progress
        drafted += step.round.drafted[0]
        accepted += min(step.round.accepted[0], len(progress.ids) - length)
        length = len(progress.ids)
    assert progress.stop_reason == cut
    assert progress.ids == free.ids[:length]
    assert (progress.drafted, progress.accepted) == (drafted, accepted)
