"""Flex attention states the same masks as the tiles: without kernels it runs on a CPU too."""

from __future__ import annotations

import pytest
import torch

from blt_core.nn import flex
from blt_core.nn.tiles import BlockTiles, attend_window

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # torch's own use
]


def tensors(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in shapes]


@pytest.mark.parametrize("window", [1, 7, 200])
def test_windows_are_those_of_tiles(window):
    q, k, v = tensors((2, 90, 4, 16), (2, 90, 2, 16), (2, 90, 2, 16))
    found, want = flex.attend_window(q, k, v, window), attend_window(q, k, v, window)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_are_those_of_tiles(window, causal):
    own, clean = (2, 9, 4, 2, 16), (2, 60, 2, 16)
    inputs = tensors(own, own, own, clean, clean)
    start = torch.randint(1, 60, (2, 9)).sort(1).values
    causal_bn = torch.rand(2, 9) < 0.5 if causal else None
    plan = {"size": 4, "window": window, "rows": 60}
    found = flex.FlexBlocks.plan(start, causal_bn, **plan).attend(*inputs)
    want = BlockTiles.plan(start, causal_bn, **plan).attend(*inputs)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
