"""Attention in tiles is attention under a dense mask: values and gradients, in each dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_core.nn import attend_blocks, block_masks
from blt_core.nn.tiles import BlockTiles, attend_window

WINDOWS = st.sampled_from([None, 1, 7, 70])
#: Rounding, relative to the largest product of an upstream gradient and a value.
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.0**-7}


def tensors(*shapes, seed):
    torch.manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def with_gradients(function, inputs, upstream):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def assert_same(found, want, dtype, largest):
    for one, other in zip(found, want, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() <= BOUNDS[dtype] * max(largest, other.abs().max())


def largest_product(up, *values):
    return up.norm(dim=-1).max() * max(v.norm(dim=-1).max() for v in values)


@pytest.mark.parametrize("dtype", BOUNDS)
@given(st.integers(1, 2), st.integers(1, 150), WINDOWS.filter(bool), st.integers(0, 99))
def test_windows_in_tiles_are_windows_under_a_mask(dtype, batch, rows, window, seed):
    q, k, v, up = tensors(
        (batch, rows, 4, 6), (batch, rows, 2, 6), (batch, rows, 2, 6), (batch, rows, 4, 6),
        seed=seed,
    )  # fmt: skip
    ahead = torch.arange(rows)[:, None] - torch.arange(rows)
    mask = (ahead >= 0) & (ahead < window)

    def dense(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=True
        ).transpose(1, 2)

    found = with_gradients(
        lambda *x: attend_window(*x, window), [x.to(dtype) for x in (q, k, v)], up
    )
    assert_same(found, with_gradients(dense, (q, k, v), up), dtype, largest_product(up, v))


@pytest.mark.parametrize("dtype", BOUNDS)
@given(st.data())
def test_blocks_in_tiles_are_blocks_under_a_mask(dtype, data):
    batch, count, size = (data.draw(st.integers(1, n)) for n in (2, 40, 5))
    rows, window = data.draw(st.integers(2, 90)), data.draw(WINDOWS)
    own, clean = (batch, count, size, 2, 6), (batch, rows, 2, 6)
    q, own_k, own_v, clean_k, clean_v, up = tensors(
        own, own, own, clean, clean, own, seed=data.draw(st.integers(0, 99))
    )
    start = torch.randint(1, rows, (batch, count)).sort(1).values
    causal = torch.rand(batch, count) < 0.5 if data.draw(st.booleans()) else None
    seen, among = block_masks(start, causal, size, torch.arange(rows)[None, None], window)
    # A causal row beyond its window sees no clean row, yet always itself.
    plan = BlockTiles.plan(start, causal, size=size, window=window, rows=rows)
    inputs = (q, own_k, own_v, clean_k, clean_v)
    found = with_gradients(plan.attend, [x.to(dtype) for x in inputs], up)
    want = with_gradients(lambda *x: attend_blocks(*x, seen, among), inputs, up)
    assert_same(found, want, dtype, largest_product(up, own_v, clean_v))


def test_blocks_at_the_very_start_see_themselves_alone():
    # Blocks of 32 rows leave nothing to fill up: the tile has no key.
    own, clean = tensors((1, 2, 32, 2, 8), (1, 50, 2, 8), seed=0)
    plan = BlockTiles.plan(torch.zeros(1, 2, dtype=torch.long), None, size=32, window=None, rows=50)
    found = plan.attend(own, own, own, clean, clean)
    by_head = own.transpose(2, 3)
    want = torch.nn.functional.scaled_dot_product_attention(by_head, by_head, by_head)
    torch.testing.assert_close(found, want.transpose(2, 3))
