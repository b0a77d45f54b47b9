"""Flags in closed form are those of asking the rule byte by byte, whole or in pieces."""

from __future__ import annotations

from random import Random

import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_core.types import Rows
from blt_plugins.patching.scan import PatchHistory, limited, scan


def by_bytes(opens, counts, limit):
    """The flags of each row by the definition: a count of the open patch's bytes."""
    flags = []
    for row, count in zip(opens, counts, strict=True):
        size, found = 0, []
        for i in range(count):
            size += 1
            ends = row[i] or i == 0 or size == limit
            size = 0 if ends else size
            found.append(ends)
        flags.append(found)
    return flags


@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=4),
    st.sampled_from([None, 1, 2, 3, 8]),
    st.integers(0, 999),
)
def test_limited_equals_the_definition(texts, limit, seed):
    rng, counts = Random(seed), [len(text) for text in texts]
    want = by_bytes(texts, counts, limit)
    width = max(counts)
    opens = torch.tensor([text + [rng.random() < 0.5] * (width - len(text)) for text in texts])
    rows = Rows(torch.zeros(len(texts), width, dtype=torch.long), tuple(counts))
    whole = limited(rows, None, opens, limit).tolist()
    asked = scan(rows, None, limit, lambda b, i, _id, _size, _mark: (bool(opens[b, i]), 0)).tolist()
    for found, also, row, count in zip(whole, asked, want, counts, strict=True):
        assert found[:count] == also[:count] == row
    assert in_pieces(texts, limit, rng) == want


def in_pieces(texts, limit, rng):
    """The flags of ragged pieces, some of them read twice after a rewind."""
    history = PatchHistory(len(texts))
    flags = [[] for _ in texts]
    while any(len(done) < len(text) for done, text in zip(flags, texts, strict=True)):
        counts = [
            min(rng.randrange(5), len(text) - len(done))
            for done, text in zip(flags, texts, strict=True)
        ]
        width = max(*counts, 1)
        opens = torch.zeros(len(texts), width, dtype=torch.bool)
        for b, (done, text, count) in enumerate(zip(flags, texts, counts, strict=True)):
            opens[b, :count] = torch.tensor(text[len(done) : len(done) + count], dtype=torch.bool)
        rows = Rows(torch.zeros(len(texts), width, dtype=torch.long), tuple(counts))
        if not any(counts):
            continue
        found = limited(rows, history, opens, limit)
        assert found.dtype == torch.bool
        for b, count in enumerate(counts):
            flags[b] += found[b, :count].tolist()
            assert history.lengths[b] == len(flags[b])
        if rng.randrange(3) == 0:
            kept = [rng.randrange(len(done) + 1) for done in flags]
            history.rewind(kept)
            flags = [done[:n] for done, n in zip(flags, kept, strict=True)]
    return flags


def test_a_rule_that_never_opens_leaves_patches_of_one_length():
    rows = Rows(torch.zeros(1, 9, dtype=torch.long), (9,))
    flags = limited(rows, None, None, 4)[0].tolist()
    assert flags == [True, False, False, False, True, False, False, False, True]
