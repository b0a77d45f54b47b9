"""The layers' own ways on a CPU give what plain torch gives."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from blt_core.nn import RMSNorm, SwiGLU, Transformer, read_weights_whole, rotary_angles, rotate


def stack(dtype):
    torch.manual_seed(0)
    return Transformer(dim=8, layers=2, heads=2, hidden=16, window=3, rope_theta=1e4).to(dtype)


def test_float64_stays_so_under_autocast():
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    plain = stack(torch.float64)(x, (5,), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stack(torch.float64)(x, (5,), None), plain)


def test_norms_under_autocast_give_what_products_take():
    norm, x = RMSNorm(8), torch.randn(3, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x).bfloat16(), functional.rms_norm(x, (8,), eps=1e-5).bfloat16())


@pytest.mark.parametrize("lent", [False, True])
def test_gate_and_up_are_one_matrix(lent):
    mlp, calls = SwiGLU(8, 16).double(), []
    mlp.gate_up.register_forward_hook(lambda *_: calls.append(1))
    if lent:
        read_weights_whole(mlp)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    gate, up = (x @ mlp.gate_up.weight.T).chunk(2, -1)
    want = (gate.sigmoid() * gate * up) @ mlp.down.weight.T
    found, up = mlp(x), torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(found, want)
    inputs = (x, mlp.gate_up.weight, mlp.down.weight)
    gradients = (torch.autograd.grad(each, inputs, up) for each in (found, want))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert bool(calls) is lent  # a weight that is lent is read by its own module alone


def test_the_gradient_of_a_rotation_turns_back():
    angles = rotary_angles(torch.arange(5), 6, 1e4).to(torch.complex128)
    x = torch.randn(5, 2, 6, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles), x)
    assert torch.equal(x, before)
