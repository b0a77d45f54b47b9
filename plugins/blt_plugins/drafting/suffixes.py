"""An index of a growing text: where its last bytes stood before.

Each id costs a bounded number of look-ups in hash tables, however long the text is, and a cut takes
back what was added. An n-gram is indexed only once its end of n - 1 ids has been seen twice, since
no longer match can be without: text that never repeats has one entry an id.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

#: So many ids are settled together, or half of those that are not, for each time moves the rest.
_SETTLED_AT_ONCE = 4096
#: The longest match that may be asked for.
LONGEST = 64


class Match(NamedTuple):
    """``length`` ids that stood before, the last of them just before position ``end``."""

    length: int
    end: int


class Suffixes:
    """The text so far, and for every place the longest match of ``least`` to ``most`` ids.

    Of equally long matches the most recent one counts. An entry of level n holds the end of the
    last n-gram of its kind, doubled, plus one if there were several: these are in level n + 1 too.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._text = array("H")
        self._levels: list[dict[bytes, int]] = [{} for _ in range(most + 1)]
        # For each id: where the text up to it stood before, and the entries that it replaced, one a
        # level from the least on (-1: there was none). What is settled has none of these.
        self._lengths, self._ends = array("B"), array("q")
        self._replaced, self._counts = array("q"), array("B")
        self._settled = 0

    def __len__(self) -> int:
        return len(self._text)

    @property
    def last_match(self) -> Match | None:
        """Where the end of the text stood before."""
        if not self._text or not self._lengths[-1]:
            return None
        return Match(self._lengths[-1], self._ends[-1])

    def extend(self, ids: Iterable[int]) -> None:
        """Add ids at the end."""
        for token in ids:
            self._text.append(token)
            self._index()

    def cut(self, length: int) -> None:
        """Forget all ids from position ``length`` on; never below what is settled."""
        while len(self._text) > length:
            end, count = len(self._text), self._counts.pop()
            for size in range(self._least + count - 1, self._least - 1, -1):
                self._take_back(size, end, self._replaced.pop())
            self._text.pop()
            self._lengths.pop()
            self._ends.pop()

    def settle(self, length: int) -> None:
        """Promise not to cut below ``length``: then nothing is kept to take back."""
        new = min(length, len(self._text)) - self._settled
        if new > len(self._counts) // 2 or new > _SETTLED_AT_ONCE:
            del self._replaced[: sum(self._counts[:new])]
            del self._counts[:new]
            self._settled += new

    def tail(self) -> Sequence[int]:
        """The last ids, as many as a match may have."""
        return self._text[max(len(self._text) - self._most, 0) :]

    def after(self, end: int, count: int) -> list[int]:
        """The ``count`` ids from position ``end`` on, which go on with themselves at the end."""
        found = self._text[end : end + count].tolist()
        period = len(self._text) - end
        while found and len(found) < count:
            found.append(found[-period])
        return found

    def _index(self) -> None:
        """Enter the n-grams that end with the last id, and note the longest that was there."""
        end, replaced = len(self._text), []
        length, match = 0, 0
        for size in range(self._least, min(self._most, end) + 1):
            key, level = self._key(end, size), self._levels[size]
            before = level.get(key, -1)
            replaced.append(before)
            if before < 0:
                level[key] = end << 1
                break
            length, match = size, before >> 1
            if self._is_extended_now(size, before):
                self._levels[size + 1][self._key(match, size + 1)] = match << 1
            level[key] = end << 1 | 1
        self._note(length, match, replaced)

    def _take_back(self, size: int, end: int, before: int) -> None:
        """Undo what one level of :meth:`_index` did."""
        key, level = self._key(end, size), self._levels[size]
        if before < 0:
            del level[key]
            return
        level[key] = before
        if self._is_extended_now(size, before):
            del self._levels[size + 1][self._key(before >> 1, size + 1)]

    def _is_extended_now(self, size: int, before: int) -> bool:
        """Whether an entry that is met for the second time goes into the next level too."""
        return not before & 1 and size < min(self._most, before >> 1)

    def _key(self, end: int, size: int) -> bytes:
        return self._text[end - size : end].tobytes()

    def _note(self, length: int, match: int, replaced: Sequence[int]) -> None:
        self._lengths.append(length)
        self._ends.append(match)
        self._replaced.extend(replaced)
        self._counts.append(len(replaced))


class SuffixCache:
    """The index of each text of a batch, as a cache that follows the decode state."""

    def __init__(self, rows: Sequence[Suffixes]) -> None:
        self.rows = rows

    @property
    def lengths(self) -> Sequence[int]:
        """Ids read, per batch row."""
        return [len(row) for row in self.rows]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget what was read after ``lengths[b]`` ids."""
        for row, length in zip(self.rows, lengths, strict=True):
            row.cut(length)

    def settle(self, lengths: Sequence[int]) -> None:
        """Promise not to rewind below ``lengths[b]``."""
        for row, length in zip(self.rows, lengths, strict=True):
            row.settle(length)
