"""The index of a growing text finds what a search of the whole text finds, after any cuts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blt_plugins.drafting.suffixes import Match, Suffixes

IDS = st.integers(0, 2)  # few, so that all repeats and overlaps
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(IDS, max_size=12)),
        st.tuples(st.just("cut"), st.integers(0, 8)),
        st.tuples(st.just("settle"), st.integers(0, 4)),
    ),
    max_size=25,
)
SIZES = st.tuples(st.integers(1, 4), st.integers(0, 4)).map(lambda pair: (pair[0], sum(pair)))


def search(text, least, most):
    """The longest end of ``text`` that stood before, the most recent of them: by looking at all."""
    for size in range(min(most, len(text)), least - 1, -1):
        ends = range(len(text) - 1, size - 1, -1)
        end = next((e for e in ends if text[e - size : e] == text[-size:]), None)
        if end is not None:
            return Match(size, end)
    return None


@given(SIZES, STEPS)
def test_it_finds_what_a_search_finds(sizes, steps):
    least, most = sizes
    index, text, settled = Suffixes(least, most), [], 0
    for kind, value in steps:
        if kind == "add":
            index.extend(value)
            text += value
        elif kind == "cut":
            text = text[: max(len(text) - value, settled)]
            index.cut(len(text))
        else:
            settled = max(settled, len(text) - value, 0)
            index.settle(settled)
        assert len(index) == len(text)
        assert index.last_match == search(text, least, most)


@given(st.lists(IDS, min_size=1, max_size=12), st.data())
def test_what_follows_goes_on_with_itself(text, data):
    index = Suffixes(1, 2)
    index.extend(text)
    end = data.draw(st.integers(0, len(text) - 1))
    count = data.draw(st.integers(0, 20))
    period = text[end:]
    assert index.after(end, count) == (period * (count // len(period) + 1))[:count]


@given(SIZES, st.lists(IDS, max_size=60), st.data())
def test_what_is_cut_leaves_nothing_behind(sizes, text, data):
    least, most = sizes
    index, fresh = Suffixes(least, most), Suffixes(least, most)
    kept = data.draw(st.integers(0, len(text)))
    index.extend(text)
    index.cut(kept)
    fresh.extend(text[:kept])
    assert index._levels == fresh._levels
    for name in ("_text", "_lengths", "_ends", "_replaced", "_counts"):
        assert getattr(index, name) == getattr(fresh, name)
