"""Layers take another way for a single row; it gives what many rows give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blt_core.nn import Linear, RMSNorm

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def rows(count, dim, dtype):
    generator = torch.Generator().manual_seed(dim)
    return torch.randn(1, count, dim, generator=generator).to(dtype)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_single_row_is_multiplied_as_one_of_many(dtype):
    layer, many = Linear(48, 80).to(dtype), rows(5, 48, dtype)
    want = nn.functional.linear(many.double(), layer.weight.double())
    for index in range(5):
        found = layer(many[:, index : index + 1])
        assert found.shape == (1, 1, 80)
        assert found.dtype == dtype
        bound = BOUNDS[dtype]
        torch.testing.assert_close(
            found.double(), want[:, index : index + 1], rtol=bound, atol=bound
        )
    assert layer(many[0, 0]).shape == (80,)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_a_single_row_is_normed_as_one_of_many(dtype, scale):
    norm, many = RMSNorm(64).to(dtype), rows(5, 64, dtype) * scale
    norm.weight.data = rows(1, 64, dtype)[0, 0].abs() + 0.5
    exact = many.double()
    want = exact / (exact.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    # In half precision both ways round once, at the end: by half a step at most.
    half = dtype in (torch.bfloat16, torch.float16)
    bound = 0.51 * torch.finfo(dtype).eps if half else BOUNDS[dtype]
    for index in range(5):
        with torch.inference_mode():
            found = norm(many[:, index : index + 1])
        assert found.dtype == dtype
        for each in (found, norm(many)[:, index : index + 1].detach()):
            torch.testing.assert_close(
                each.double(), want[:, index : index + 1].detach(), rtol=bound, atol=1e-7
            )


def test_a_single_row_has_gradients():
    norm, layer = RMSNorm(8).double(), Linear(8, 8).double()
    x = rows(1, 8, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: layer(norm(y)), (x,))
    layer(norm(x)).sum().backward()
    assert norm.weight.grad is not None
    assert layer.weight.grad is not None


def test_rows_of_width_one_that_need_gradients_in_half_precision_have_them():
    layer = Linear(8, 8).bfloat16()
    layer(rows(1, 8, torch.bfloat16)).sum().backward()
    assert layer.weight.grad.shape == (8, 8)
