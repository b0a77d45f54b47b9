"""What most often followed n-grams of given texts is what counting in all of them finds."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from blt_plugins.drafting.continuations import Continuations
from blt_plugins.drafting.suffixes import Match

IDS = st.integers(0, 2)  # few, so that all repeats and overlaps
TEXTS = st.lists(st.lists(IDS, max_size=25), max_size=3)
SIZES = st.tuples(st.integers(1, 4), st.integers(0, 4)).map(lambda pair: (pair[0], sum(pair)))


def followed(texts, ids, least, most):
    """(length, places, alone) of the longest end of ``ids`` that something follows.

    By looking at all. The places, as (text, position), of the most frequent id after it, in order;
    alone: there is one place in all.
    """
    for size in range(min(most, len(ids)), least - 1, -1):
        ends = [
            (number, end)
            for number, text in enumerate(texts)
            for end in range(size, len(text))
            if text[end - size : end] == ids[len(ids) - size :]
        ]
        counts = Counter(texts[number][end] for number, end in ends)
        if ends:
            most_often = max(counts.values())
            often = [at for at in ends if counts[texts[at[0]][at[1]]] == most_often]
            return size, often, len(ends) == 1
    return None


def at(texts, place):
    """A place in all texts, each of which has an id after it that belongs to none."""
    number, end = place
    return sum(len(text) + 1 for text in texts[:number]) + end


@given(TEXTS, SIZES, st.lists(IDS, max_size=12))
def test_the_longest_match_and_what_followed_it_most_often(texts, sizes, ids):
    found, wanted = Continuations(texts, *sizes).longest(ids), followed(texts, ids, *sizes)
    if wanted is None:
        assert found is None
    else:
        size, places, _ = wanted
        assert found == Match(size, at(texts, places[-1])), "the most recent of equally frequent"


@given(TEXTS, SIZES, st.lists(IDS, max_size=12), st.integers(0, 12))
def test_each_id_is_decided_anew_until_a_place_is_the_only_one(texts, sizes, ids, count):
    wanted, alone = [], False
    while len(wanted) < count and not alone:
        found = followed(texts, (ids + wanted), *sizes)
        if found is None:
            break
        _, places, alone = found
        number, end = places[-1]
        wanted += texts[number][end:] if alone else [texts[number][end]]
    assert Continuations(texts, *sizes).after(ids, count) == wanted[:count]


def test_a_place_that_is_the_only_one_is_copied_on():
    texts = [list(b"abcX"), list(b"bcY bcY")]
    assert bytes(Continuations(texts, 1, 2).after(list(b"ab"), 9)) == b"cX"
    assert bytes(Continuations(texts, 1, 2).after(list(b"b"), 4)) == b"cY b"


def test_nothing_matches_across_two_texts_and_an_end_is_followed_by_nothing():
    texts = Continuations([[1, 2, 7, 1, 2], [3, 4]], 2, 4)
    assert texts.longest([2, 3]) is None
    assert texts.longest([9, 1, 2]) == Match(2, 2)
    assert texts.after([1, 2], 9) == [7, 1, 2], "what follows stops with the text"
    assert texts.longest([3, 4]) is None


def test_no_texts_have_nothing():
    assert Continuations([], 1, 8).after([1, 2, 3], 4) == []
    assert Continuations([[]], 1, 8).longest([1]) is None
