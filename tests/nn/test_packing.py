"""Packed rows are the rows of a padded batch: the same numbers, nothing on padding, no leaks."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_core.nn import Span, Transformer, take_rows

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any)


@given(COUNTS, st.integers(0, 3))
def test_packing_drops_padding_and_unpacking_puts_rows_back(counts, surplus):
    width = max(counts) + surplus
    packing = Span.whole(counts, width, None, torch.device("cpu")).packed().packing
    if packing is None:
        assert sum(counts) > 0.9 * len(counts) * width
        return
    x = torch.randn(len(counts), width, 2, 3)
    packed = packing.pack(x)
    assert packed.shape == (1, sum(counts), 2, 3)
    valid = torch.arange(width) < torch.tensor(counts)[:, None]
    assert torch.equal(packing.unpack(packed), x * valid[..., None, None])


@given(
    COUNTS.filter(lambda counts: min(counts) > 0), st.sampled_from([None, 3]), st.integers(0, 99)
)
def test_a_stack_gives_each_row_of_a_ragged_batch_what_it_gives_it_alone(counts, window, seed):
    torch.manual_seed(seed)
    stack = Transformer(dim=8, layers=2, heads=2, hidden=8, window=window, rope_theta=1e4).double()
    for parameter in stack.parameters():
        parameter.data.mul_(20) if parameter.dim() > 1 else None
    x = torch.randn(len(counts), max(counts), 8, dtype=torch.float64, requires_grad=True)
    together = stack(x, tuple(counts), None)
    loss = torch.zeros((), dtype=torch.float64)
    for row, count in enumerate(counts):
        alone = stack(x[row : row + 1, :count], (count,), None)
        torch.testing.assert_close(together[row, :count], alone[0], rtol=1e-9, atol=1e-9)
        loss = loss + together[row, :count].square().sum()
    (gradient,) = torch.autograd.grad(loss, x)
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    assert gradient[~valid].abs().sum() == 0
    assert gradient[valid].abs().min() > 0


@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(0, 4), st.integers(1, 3), st.integers(0, 9)
)
def test_rows_are_taken_from_their_own_batch_row(batch, rows, taken, depth, seed):
    torch.manual_seed(seed)
    x = torch.randn(batch, rows, depth, requires_grad=True)
    at = torch.randint(rows, (batch, taken, 2))
    found = take_rows(x, at)
    assert torch.equal(found, torch.stack([x[b][at[b]] for b in range(batch)]))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    uses = torch.stack([torch.bincount(at[b].flatten(), minlength=rows) for b in range(batch)])
    assert torch.equal(gradient, uses[..., None].expand_as(x).float())
