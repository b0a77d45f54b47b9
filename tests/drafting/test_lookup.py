"""What a look-up proposes, on a stub of the decode operations."""

from __future__ import annotations

import pytest

from blt_core.component import BuildContext
from blt_core.decoding.state import rewind_to
from blt_core.types import Draws, IdScheme, Sampling
from blt_plugins.drafting.lookup import LookupDrafter, LookupParams

SCHEME = IdScheme()


class Texts:
    """Texts that are appended to and cut, with a count of the ids that were read."""

    scheme = SCHEME

    def __init__(self, *texts: bytes) -> None:
        self.ids = [[SCHEME.bos, *text] for text in texts]
        self.read = 0
        self._cache = None

    @property
    def lengths(self):
        return tuple(map(len, self.ids))

    def text(self, row, start=0):
        self.read += len(self.ids[row]) - start
        return self.ids[row][start:]

    def append(self, ids):
        for row, new in zip(self.ids, ids, strict=True):
            row.extend(new)

    def rewind(self, lengths):
        for row, length in zip(self.ids, lengths, strict=True):
            del row[length:]
        if self._cache is not None:
            rewind_to(self._cache, self.lengths)

    def attach(self, owner, make):
        self._cache = self._cache or make(len(self.ids))
        return self._cache


def propose(drafter, texts, most=99):
    draft = drafter.draft(texts, [most] * len(texts.ids), Sampling(), Draws((0,)))
    return [bytes(ids) for ids in draft.ids]


def lookup(**keys):
    return LookupDrafter(LookupParams(**keys), BuildContext())


def test_the_longest_match_wins_then_the_most_recent():
    assert propose(lookup(draft_bytes=3), Texts(b"abcX abcd1 bcd2 abcd")) == [b"1 b"]
    assert propose(lookup(draft_bytes=3), Texts(b"abc1 abc2 abc")) == [b"2 a"]
    assert propose(lookup(draft_bytes=3, max_bytes=3), Texts(b"abcd1 bcd2 abcd")) == [b"2 a"]
    assert propose(lookup(min_bytes=4), Texts(b"abc1 abc")) == [b""]


def test_what_reaches_the_end_goes_on_with_itself():
    assert propose(lookup(draft_bytes=7), Texts(b"xyxyxy")) == [b"xyxyxyx"]


def test_own_text_comes_before_files_unless_theirs_is_longer(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc9 longer abc8")
    files = (str(path),)
    assert propose(lookup(draft_bytes=1, files=files), Texts(b"abc1.abc")) == [b"1"]
    assert propose(lookup(draft_bytes=1, files=files), Texts(b"abc1 longer abc")) == [b"8"]
    assert propose(lookup(draft_bytes=1, files=files), Texts(b"new abc")) == [b"8"]


def test_no_more_is_proposed_than_is_asked_for():
    assert propose(lookup(draft_bytes=4), Texts(b"abcdef abc"), most=2) == [b"de"]
    assert propose(lookup(), Texts(b"abcdef abc"), most=0) == [b""]


def test_rows_look_in_their_own_text():
    texts = Texts(b"abc1 abc", b"abc2 abc", b"nothing")
    assert propose(lookup(draft_bytes=1), texts) == [b"1", b"2", b""]


@pytest.mark.parametrize("rounds", [50])
def test_no_byte_is_read_twice_unless_it_was_cut_off(rounds):
    drafter, texts = lookup(), Texts(b"the text so far " * 40)
    length, cut = texts.lengths[0], 0
    for number in range(rounds):
        propose(drafter, texts)
        texts.append([[number % 7, number % 5, number % 3]])
        propose(drafter, texts)
        texts.rewind([texts.lengths[0] - 2])
        cut += 2
    assert texts.read <= length + 3 * rounds + cut
