"""The block-diffusion objective against the plain reference, one block at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from blt_core.component import BuildContext
from blt_core.protocols import UNSCORED
from blt_core.testing.reference import block_logits, row_logits, true_flags
from blt_core.types import Rows
from blt_plugins.training.objectives.block_diffusion import (
    BlockDiffusionObjective,
    BlockDiffusionObjectiveParams,
    sample_starts,
)
from tests.engine.models import model as tiny_model
from tests.engine.models import shape

TEXTS = [b"def f(x):\n    return x + 1\n", b"import os, sys\nprint(os.getcwd())\n\x00\xff"]
CONTEXT = BuildContext()


def objective(**params) -> BlockDiffusionObjective:
    return BlockDiffusionObjective(BlockDiffusionObjectiveParams(**params), CONTEXT)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(model, texts, *, ended=True):
    """Rows, flags and targets of whole texts, padded; ``ended``: EOS follows each."""
    scheme = model.scheme
    ids = [[scheme.bos, *scheme.encode(text), *([scheme.eos] if ended else [])] for text in texts]
    width = max(map(len, ids)) - 1
    rows = torch.tensor([row[:-1] + [0] * (width - len(row) + 1) for row in ids])
    targets = torch.tensor([row[1:] + [UNSCORED] * (width - len(row) + 1) for row in ids])
    given = Rows(rows, tuple(len(row) - 1 for row in ids))
    return ids, given, model.patcher.flags(given, None), targets


@pytest.fixture(params=[index for index in range(9) if not shape(index).reads_byte_states])
def model(request):
    return tiny_model(request.param)


def flags_of(model, ids, upto: int) -> list[bool]:
    """True flags of a text up to ``upto``, and cleared ones after it, one more than ids."""
    flags = true_flags(model, ids)
    return flags[: upto + 1] + [False] * (len(ids) - upto)


def cross_entropy(logits, target) -> float:
    return float(functional.cross_entropy(logits[None], torch.tensor([target])))


def test_mask_loss_is_that_of_each_block_alone(model):
    ids, rows, flags, targets = batch(model, TEXTS)
    goal = objective(block_bytes=5, share=0.6, inside_share=0.4, all_masked_share=0.3)
    masked, _ = goal.blocks(flags, targets, generator(1))
    total, parts = goal.loss(model, rows, flags, targets, generator(1))
    expected = 0.0
    for b, text in enumerate(ids):
        known = true_flags(model, text[:-1])
        for n in range(masked.count):
            scored = [j for j in range(5) if masked.weights_bnB[b, n, j] > 0]
            if not scored:
                continue
            start = int(masked.start_bn[b, n])
            block = masked.ids_bnB[b, n].tolist()
            # What the block may not see is cut off: nothing but the text before its start is given.
            logits = block_logits(model, text[:start], known[: start + 1], block, start)
            for j in scored:
                assert block[j] == model.scheme.mask
                weight = float(masked.weights_bnB[b, n, j])
                expected += weight * cross_entropy(logits[j], text[start + j])
    assert parts["mask_loss"] == pytest.approx(expected, abs=1e-9)
    assert float(total) == pytest.approx(sum(parts.values()), abs=1e-9)


def test_stale_rows_are_what_drafting_by_the_decoder_alone_computes(model):
    ids, rows, flags, targets = batch(model, TEXTS)
    goal = objective(block_bytes=4, share=0.0, stale_share=0.7)
    _, stale = goal.blocks(flags, targets, generator(2))
    parts = goal.loss(model, rows, flags, targets, generator(2))[1]
    expected, count = 0.0, 0
    for b, text in enumerate(ids):
        for n in range(stale.count):
            start = int(stale.start_bn[b, n])
            last = min(start + 4, len(text) - 1)
            if not bool((stale.weights_bnB[b, n] > 0).any()):
                continue
            logits = row_logits(model, text[:last], flags_of(model, text[:last], start))
            for row in range(start, last):
                expected += cross_entropy(logits[row], text[row + 1])
                count += 1
    assert count > 0
    assert parts["mask_loss"] == 0
    assert parts["stale_loss"] == pytest.approx(expected / count, abs=1e-9)


@given(st.sets(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 2**32))
def test_a_batch_draws_one_of_several_sizes(sizes, seed):
    model = tiny_model(0)
    _, _, flags, targets = batch(model, TEXTS)
    goal = objective(block_bytes=tuple(sizes), share=0.5, inside_share=0.5, stale_share=0.5)
    assert goal.block_bytes == tuple(sorted(sizes))
    masked, stale = goal.blocks(flags, targets, generator(seed))
    size = masked.ids_bnB.shape[2]
    assert size in sizes
    assert stale.ids_bnB.shape[2] == size
    # But for the draw of the size it is the batch of that size alone.
    rng = generator(seed)
    torch.randint(len(sizes), (), generator=rng)
    alone = objective(block_bytes=size, share=0.5, inside_share=0.5, stale_share=0.5)
    for found, expected in zip((masked, stale), alone.blocks(flags, targets, rng), strict=True):
        for name in ("start_bn", "ids_bnB", "targets_bnB", "weights_bnB"):
            assert torch.equal(getattr(found, name), getattr(expected, name))


def test_all_sizes_are_drawn_about_as_often():
    model = tiny_model(0)
    _, _, flags, targets = batch(model, TEXTS)
    goal = objective(block_bytes=(4, 8, 16))
    drawn = [
        goal.blocks(flags, targets, generator(seed))[0].ids_bnB.shape[2] for seed in range(300)
    ]
    assert all(70 < drawn.count(size) < 130 for size in (4, 8, 16))


@pytest.mark.parametrize("sizes", [0, (), (4, 0), (4, 8, 4)])
def test_sizes_that_are_none_are_refused(sizes):
    with pytest.raises(ValueError, match="expected one size, or different ones, of at least 1"):
        objective(block_bytes=sizes)


def test_weights_are_one_over_the_rate_and_a_mean_over_bytes_inside_the_text(model):
    _, _, flags, targets = batch(model, TEXTS)
    goal = objective(block_bytes=6, share=0.0, all_masked_share=1.0)
    masked, _ = goal.blocks(flags, targets, generator(3))
    # With t = 1 every byte inside the text is scored once, so the weights are a mean.
    assert float(masked.weights_bnB.sum()) == pytest.approx(1.0)
    drawn = objective(block_bytes=6, share=1.0)
    sums = [
        float(drawn.blocks(flags, targets, generator(s))[0].weights_bnB.sum()) for s in range(400)
    ]
    assert math.isclose(sum(sums) / len(sums), 1.0, abs_tol=0.05)


def test_blocks_start_where_patches_open_or_anywhere_inside_the_text():
    flags = torch.tensor([[True, False, True, False, True, False]])
    targets = torch.tensor([[1, 2, 3, 4, UNSCORED, UNSCORED]])
    starts = sample_starts(flags & (targets != UNSCORED), torch.tensor([9.0]), generator())
    assert sorted(starts[0].tolist()) == [1, 3]
    inside = sample_starts(targets != UNSCORED, torch.tensor([9.0]), generator())
    assert sorted(inside[0].tolist()) == [1, 2, 3, 4]


def test_the_same_generator_gives_the_same_loss(model):
    _, rows, flags, targets = batch(model, TEXTS)
    goal = objective(share=0.5, stale_share=0.5, inside_share=0.2)
    first, again, other = (
        float(goal.loss(model, rows, flags, targets, generator(seed))[0]) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_nothing_is_float64_on_the_device_and_nothing_random_drawn_there(float64_on_the_cpu):
    model = tiny_model(0)
    _, rows, flags, targets = batch(model, TEXTS)
    goal = objective(share=0.5, stale_share=0.5, inside_share=0.2)
    with float64_on_the_cpu:
        goal.loss(model, rows, flags, targets, generator())


def test_clean_loss_is_that_of_the_ar_objective(model):
    from blt_plugins.training.objectives.next_byte import NextByte, NextByteParams

    _, rows, flags, targets = batch(model, TEXTS)
    parts = objective(share=1.0).loss(model, rows, flags, targets, generator())[1]
    plain = NextByte(NextByteParams(), CONTEXT).loss(model, rows, flags, targets, generator())[0]
    assert parts["clean_loss"] == pytest.approx(float(plain), abs=1e-12)
