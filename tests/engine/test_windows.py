"""Windowed attention and the row cache equal plain dense attention, however rows arrive and go."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from blt_core.errors import EngineError
from blt_core.nn import RowCache, Span, attend
from blt_core.nn.cache import SLACK, ring_size
from tests.engine.layouts import TOLERANCE
from tests.engine.naive import attention, square_mask
from tests.engine.seen import saw
from tests.engine.strategies import examples

HEADS, WIDTH = 4, 4
CPU = torch.device("cpu")


def random_rows(batch, rows, heads, seed):
    """(b, r, heads, d) of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, rows, heads, WIDTH, dtype=torch.float64, generator=generator)


def dense(q, k, v, window):
    """(r, h, d): plain attention of one text; query head h reads key head h // (h / g)."""
    mask = square_mask(len(q), [], 0, window)
    shared = q.shape[1] // k.shape[1]
    heads = [
        attention(q[:, h], k[:, h // shared], v[:, h // shared], mask) for h in range(q.shape[1])
    ]
    return torch.stack(heads, dim=1)


@examples(40)
@given(
    st.integers(1, 60),
    st.sampled_from([None, 1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(0, 999),
)
def test_bands_equal_dense_windows(rows, window, kv_heads, batch, seed):
    q = random_rows(batch, rows, HEADS, seed)
    k, v = (
        random_rows(batch, rows, kv_heads, seed + 1),
        random_rows(batch, rows, kv_heads, seed + 2),
    )
    got = attend(q, k, v, Span.whole((rows,) * batch, rows, window, CPU))
    for b in range(batch):
        assert_close(got[b], dense(q[b], k[b], v[b], window), **TOLERANCE)


@examples(12)
@given(
    st.sampled_from([None, 1, 4, 8]), st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 999)
)
def test_a_cache_that_settles_and_grows_equals_dense_windows(window, kv_heads, heads, seed):
    """Ragged rows in chunks, rewound and settled; settled rows behind the window are dropped."""
    rng, batch, most = Random(seed), 3, 320
    q = random_rows(batch, most, HEADS, seed)
    k, v = (
        random_rows(batch, most, kv_heads, seed + 1),
        random_rows(batch, most, kv_heads, seed + 2),
    )
    want = torch.stack([dense(q[b], k[b], v[b], window) for b in range(batch)])
    cache, settled = RowCache(batch, window), [0] * batch
    patience = rng.choice((2, 2, 60))  # passes between promises
    speed = [rng.choice((1, 3, 9)) for _ in range(batch)]
    # Once, more rows than a ring holds come at a time.
    long, many = rng.randrange(40, 100), 2 * ring_size(window or 0)
    while max(cache.lengths) < most:
        starts = list(cache.lengths)
        counts = [
            min(rng.randint(0, s), most - at) if rng.randrange(4) else 0
            for s, at in zip(speed, starts, strict=True)
        ]
        if starts[0] >= long and many:
            counts[0], many = min(many, most - starts[0]), 0
        if not any(counts):
            continue
        width = max(counts) + rng.randrange(2)

        def chunk(x, starts=starts, counts=counts, width=width):
            out = torch.full((batch, width, *x.shape[2:]), 9.0, dtype=x.dtype)
            for b, (at, count) in enumerate(zip(starts, counts, strict=True)):
                out[b, :count] = x[b, at : at + count]
            return out

        span = cache.extend(counts, width, CPU)
        cache.write("k", span, chunk(k), heads=heads)
        cache.write("v", span, chunk(v), heads=heads)
        keys, values = chunk(k), chunk(v)
        if not span.from_start:
            keys, values = (cache.read(lane, span) for lane in ("k", "v"))
        got = attend(chunk(q), keys, values, span)
        assert got.isfinite().all()
        saw("a ring longer than usual", window and cache.size > ring_size(window))
        for b, (at, count) in enumerate(zip(starts, counts, strict=True)):
            assert_close(got[b, :count], want[b, at : at + count], **TOLERANCE)
        rewind_some(cache, window, rng, settled)
        if rng.randrange(patience) == 0:
            settled = [
                max(s, n - rng.randint(0, 6)) for s, n in zip(settled, cache.lengths, strict=True)
            ]
            cache.settle(settled)
            check_size(cache, window, settled)
        check_places(cache, k, window, rng, settled)
    if window is None:
        assert cache.nbytes <= 2 * (k.nbytes + v.nbytes), "half of a lane is used"
    else:
        assert most > 3 * ring_size(window), "the ring turns three times at least"


@examples(20)
@given(
    st.sampled_from([None, 1, 4, 8]), st.sampled_from([1, 4]), st.booleans(), st.integers(0, 999)
)
def test_of_a_settled_prompt_a_window_keeps_the_end(window, kv_heads, heads, seed):
    """Prompts of all lengths read at once, then rows one by one; lanes are as long as ever."""
    rng, batch, more = Random(seed), 3, 60
    counts = [rng.choice((0, 1, 9, 47, 48, 49, 150)) for _ in range(batch)]
    counts[rng.randrange(batch)] = 200
    q = random_rows(batch, 200 + more, HEADS, seed)
    k, v = (random_rows(batch, 200 + more, kv_heads, seed + i) for i in (1, 2))
    settled = [max(count - rng.randint(0, 20), 0) for count in counts]
    cache, width = RowCache(batch, window), max(counts) + rng.randrange(2)
    span = cache.extend(counts, width, CPU, settled=settled)
    for lane, values in (("k", k), ("v", v)):
        cache.write(lane, span, values[:, :width], heads=heads)
    got = attend(q[:, :width], k[:, :width], v[:, :width], span)
    want = [dense(q[b], k[b], v[b], window) for b in range(batch)]
    for b, count in enumerate(counts):
        assert_close(got[b, :count], want[b][:count], **TOLERANCE)
    assert cache.size <= (256 if window is None else 2 * ring_size(window))
    check_places(cache, k, window, rng, settled)
    if max(counts) > cache.size:
        with pytest.raises(EngineError, match=f"of which {cache.size} were kept"):
            cache.read("k", span)
    rewind_some(cache, window, rng, settled)
    for _ in range(more):
        starts = list(cache.lengths)
        span = cache.extend([1] * batch, 1, CPU)
        for lane, values in (("k", k), ("v", v)):
            cache.write(lane, span, take(values, starts), heads=heads)
        got = attend(take(q, starts), cache.read("k", span), cache.read("v", span), span)
        for b, at in enumerate(starts):
            assert_close(got[b, 0], want[b][at], **TOLERANCE)


def take(x, starts):
    """(b, 1, …): a row of each text."""
    return torch.stack([x[b, at : at + 1] for b, at in enumerate(starts)])


@examples(30)
@given(st.sampled_from([None, 4, 8]), st.booleans(), st.integers(0, 999))
def test_lanes_keep_their_order_in_memory_whatever_is_done_to_them(window, heads, seed):
    """Rows of a head stay side by side (or places do) while a lane grows and is reordered."""
    rng, batch = Random(seed), 3
    cache, texts = RowCache(batch, window), [[] for _ in range(batch)]
    for turn in range(12):
        counts = [rng.randint(0, 9) for _ in range(batch)]
        counts = [max(count, int(not turn)) for count in counts]
        span = cache.extend(counts, max(counts), CPU)
        new = random_rows(batch, max(counts), 2, 100 * seed + turn)
        cache.write("k", span, new, heads=heads)
        for b, count in enumerate(counts):
            texts[b].extend(new[b, :count])
        if rng.randrange(3) == 0:
            cache.settle(cache.lengths)
        if rng.randrange(2):
            order = [rng.randrange(batch) for _ in range(batch)]
            cache.reorder(order)
            texts = [list(texts[b]) for b in order]
        stored, positions = cache.used("k"), cache.positions(CPU)
        places = 1 if not heads else 2
        assert stored.transpose(1, places)[0, 0].is_contiguous()
        for b, text in enumerate(texts):
            first = 0 if window is None else max(len(text) - window, 0)
            at = {int(p): stored[b, i] for i, p in enumerate(positions[b])}
            assert all((at[i] == text[i]).all() for i in range(first, len(text)))


def rewind_some(cache, window, rng, settled):
    """By a few rows or none, or by all that are unsettled; by one more is refused."""
    if settled[0]:
        with pytest.raises(EngineError, match=f"rows below {settled[0]} are settled"):
            cache.rewind([settled[0] - 1, *cache.lengths[1:]])
    if rng.randrange(3):
        return
    ends, far = tuple(cache.lengths), rng.randrange(8) == 0
    both = zip(settled, ends, strict=True)
    cache.rewind([s if far else rng.randint(max(s, n - 5), n) for s, n in both])
    deepest = max(n - s for n, s in zip(ends, cache.lengths, strict=True))
    saw("a rewind by more than a ring holds", window and deepest > ring_size(window))


def check_size(cache, window, settled):
    """A window bounds the lanes, unless much is unsettled."""
    unsettled = max(n - s for s, n in zip(settled, cache.lengths, strict=True))
    if window is not None and unsettled <= SLACK:
        assert cache.used("k").shape[1] <= 2 * ring_size(window)


def check_places(cache, k, window, rng, settled):
    """The places that a block may read hold the keys of the positions that they stand for."""
    starts = [rng.randint(s, n) for s, n in zip(settled, cache.lengths, strict=True)]
    if not any(starts):
        return
    stored, positions = cache.used("k"), cache.positions(CPU)
    assert stored.shape[1] == positions.shape[1]
    for b, start in enumerate(starts):
        first = max(start - window, 0) if window is not None else 0
        at = {int(p): stored[b, i] for i, p in enumerate(positions[b])}
        for position in range(first, start):
            assert (at[position] == k[b, position]).all()


def test_rounds_of_long_drafts_resize_a_ring_once():
    """A ring that grew for a draft keeps its length while drafts are as long."""
    cache, sizes = RowCache(1, 64), []
    for _ in range(12):
        begin = cache.lengths[0]
        for _ in range(2 * SLACK):
            span = cache.extend([1], 1, CPU)
            cache.write("k", span, torch.zeros(1, 1, 1))
        cache.rewind([begin + 20])
        cache.settle([begin + 16])
        sizes.append(cache.nbytes)
    assert sum(one != other for one, other in pairwise(sizes)) == 1
