"""Layers without modules give what the modules give, in decoding, and give way to hooks."""

from __future__ import annotations

import pytest
import torch

from blt_core.nn import Linear, Transformer
from tests.nn.test_single_rows import BOUNDS

WIDTH = 48


def stack(dtype, window):
    """Two layers with shared key heads."""
    torch.manual_seed(3)
    layers = Transformer(
        dim=WIDTH, layers=2, heads=4, kv_heads=2, hidden=80, window=window, rope_theta=1e4
    )
    for weight in layers.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0.0, weight.shape[1] ** -0.5)
    return layers.to(dtype)


@torch.inference_mode()
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [(6, 6), (1, 1), (2, 5), (0, 3), (40, 2)])
def test_bare_layers_give_what_modules_give(counts, dtype, window):
    layers, rows = stack(dtype, window), torch.randn(2, 60, WIDTH).to(dtype)
    bare, plain = layers.new_cache(2), layers.new_cache(2)
    assert bare.layers
    plain.layers = None  # as where a module has hooks
    for first, new in ((0, (4, 9)), (9, counts)):
        x = rows[:, first : first + max(new)]
        found, want = (layers(x, new, cache) for cache in (bare, plain))
        bound = BOUNDS[dtype]
        for b, count in enumerate(new):
            torch.testing.assert_close(found[b, :count], want[b, :count], rtol=bound, atol=bound)


@torch.inference_mode()
def test_hooks_of_modules_are_asked():
    layers, asked = stack(torch.float64, None), []
    layers.layers[1].mlp.down.register_forward_hook(lambda *_: asked.append(1))
    cache = layers.new_cache(1)
    assert cache.layers is None
    layers(torch.randn(1, 3, WIDTH, dtype=torch.float64), (3,), cache)
    assert asked == [1]


class Doubled(Linear):
    """A linear map that does more than multiply."""

    def forward(self, x):
        """Twice the product."""
        return 2 * super().forward(x)


def wrap(layers):
    """As adapters do: another class with a ``weight`` in a linear map's place."""
    layers.layers[0].mlp.down.__class__ = Doubled


def patch(layers):
    """A ``forward`` of an instance's own."""
    down = layers.layers[0].mlp.down
    own = down.forward
    down.forward = lambda x: 2 * own(x)


@torch.inference_mode()
@pytest.mark.parametrize("change", [wrap, patch])
def test_modules_that_do_more_than_their_class_are_called(change):
    layers, x = stack(torch.float64, None), torch.randn(1, 3, WIDTH, dtype=torch.float64)
    plain = layers(x, (3,), None)
    change(layers)
    cache = layers.new_cache(1)
    assert cache.layers is None
    whole = layers(x, (3,), None)
    assert not torch.allclose(whole, plain)
    torch.testing.assert_close(layers(x, (3,), cache), whole)


@torch.inference_mode()
def test_a_hook_of_all_modules_is_asked():
    layers, asked = stack(torch.float64, None), []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: asked.append(1))
    try:
        assert layers.new_cache(1).layers is None
    finally:
        hook.remove()
    assert layers.new_cache(1).layers


@torch.inference_mode()
def test_autocast_narrows_no_residual_stream():
    layers, x = stack(torch.float32, None), torch.randn(1, 3, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        found = layers(x, (3,), layers.new_cache(1))
        want = layers(x, (3,), None)
    assert found.dtype == want.dtype == torch.float32
    torch.testing.assert_close(found, want)


def test_weights_are_those_of_the_time_when_a_cache_is_made():
    layers = stack(torch.float64, None)
    x = torch.randn(1, 3, WIDTH, dtype=torch.float64)
    with torch.inference_mode():
        before = layers(x, (3,), layers.new_cache(1))
    for weight in layers.parameters():
        weight.data = weight.data * 1.5
    with torch.inference_mode():
        after = layers(x, (3,), layers.new_cache(1))
        whole = layers(x, (3,), None)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, whole)
