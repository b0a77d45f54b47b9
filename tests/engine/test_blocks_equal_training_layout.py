"""Invariant 4: a block's logits in the engine equal those of the training layout, row by row."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from blt_core.decoding.state import DecodeState
from blt_core.model import patch_layout
from blt_core.testing.reference import latent_of_row
from blt_core.types import Blocks, Latents, Rows
from tests.engine import models, naive
from tests.engine.layouts import TOLERANCE, aligned_starts, flags_of, forward, noise, random_ids
from tests.engine.programs import same_logits
from tests.engine.strategies import denoising_indices, examples, model_indices

seeds = st.integers(0, 2**16)
lengths = st.integers(3, 40)
sizes = st.integers(3, 12)


def prefix_state(model, ids):
    """A state that has read ``ids``, all after an empty prompt, so that it can be rewound."""
    state = DecodeState(model, [[]], [100])
    state.append([ids[1:]])
    state.next_logits([1])
    return state


@examples(40)
@given(denoising_indices, lengths, sizes, seeds)
def test_aligned_blocks_equal_all_blocks_of_the_training_layout(index, length, size, seed):
    model, rng = models.model(index), Random(seed)
    ids = random_ids(model, length, seed)
    flags = flags_of(model, ids)
    starts = aligned_starts(flags, length)
    blocks = [noise(model, ids, start, size, rng) for start in starts]
    trained = forward(model, ids, flags, blocks, starts).blocks.logits[0]
    state = prefix_state(model, ids)
    for n in reversed(range(len(starts))):
        end = starts[n + 1] if n + 1 < len(starts) else length
        within = rng.randint(starts[n] + 1, min(end, starts[n] + size - 2))
        state.rewind([within])  # inside patch n + 1, or to its end
        block = state.open_block(size, start="aligned")
        assert (block.start, block.given) == ((starts[n],), (within - starts[n],))
        block.ids[0][:] = blocks[n]
        same_logits(model, state.denoise(block)[0], trained[n])


@examples(40)
@given(denoising_indices, lengths, sizes, seeds)
def test_forced_blocks_equal_the_layout_with_the_last_flag_set(index, length, size, seed):
    model, rng = models.model(index), Random(seed)
    ids = random_ids(model, length, seed)
    flags = [*flags_of(model, ids)[:-1], True]
    content = noise(model, ids, length, size, rng)
    # The text of training goes on behind the start; a block does not see it.
    longer = [*ids, *(rng.randrange(256) for _ in range(5))]
    trained = forward(model, longer, [*flags, *[False] * 5], [content], [length]).blocks.logits[
        0, 0
    ]
    state = DecodeState(model, [ids[1:]], [100])
    passed = rng.randrange(2) > 0
    if passed:
        state.next_logits([1])
    scored = not passed or rng.randrange(2) > 0
    block = state.open_block(size, start="frontier", closure="forced", scored=scored)
    block.ids[0][:] = content
    same_logits(model, state.denoise(block)[0], trained)


@examples(40)
@given(denoising_indices, lengths, sizes, st.integers(0, 6), seeds)
def test_unclosed_blocks_equal_the_layout_with_blocks_at_such_starts(
    index, length, size, new, seed
):
    model, rng = models.model(index), Random(seed)
    ids = random_ids(model, length + new, seed)
    flags = flags_of(model, ids[:length]) + [False] * new  # what came after the pass is unknown
    content = noise(model, ids, length + new, size, rng)
    starts = [length + new, *aligned_starts(flags, length)]
    blocks = [content, *(noise(model, ids, start, size, rng) for start in starts[1:])]
    trained = forward(model, ids, flags, blocks, starts).blocks.logits[0, 0]
    state = prefix_state(model, ids[:length])
    state.append([ids[length:]])
    block = state.open_block(size, start="frontier", closure="none")
    block.ids[0][:] = content
    same_logits(model, state.denoise(block)[0], trained)


@pytest.mark.parametrize("index", [i for i in range(9) if models.model(i).decoder.denoises])
def test_no_blocks_are_computed_as_readily_as_some(index):
    model = models.model(index)
    empty = torch.zeros((1, 0), dtype=torch.long)
    blocks = Blocks(torch.zeros((1, 0, 4), dtype=torch.long), empty, empty)
    rows = Rows(torch.tensor([random_ids(model, 30, 0)]), (30,))
    output = model.forward(rows, model.patcher.flags(rows, None), blocks)
    assert output.blocks.logits.shape == (1, 0, 4, model.scheme.size)


@examples(60)
@given(model_indices, st.integers(2, 40), st.integers(1, 9), seeds)
def test_the_decoder_equals_a_dense_formulation_of_the_layout(index, length, size, seed):
    model, rng = models.model(index), Random(seed)
    decoder = model.decoder
    ids = random_ids(model, length, seed)
    flags = flags_of(model, ids)
    starts = aligned_starts(flags, length) if decoder.denoises else []
    blocks = [noise(model, ids, start, size, rng) for start in starts]
    patches, latent_br = patch_layout(torch.tensor([flags[1:]]), (length,))
    reads = [latent_of_row(flags, i) for i in range(length)]
    assert latent_br[0].tolist() == reads
    latents = torch.randn(
        1,
        patches.counts[0],
        decoder.from_latent.in_features,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )
    states = (
        torch.randn(1, length, models.DIM, dtype=torch.float64) if decoder.embed is None else None
    )
    given_blocks = None
    if blocks:
        block_reads = [latent_of_row(flags, start - 1) for start in starts]
        given_blocks = Blocks(
            torch.tensor([blocks]), torch.tensor([starts]), torch.tensor([block_reads])
        )
        reads += [at for at in block_reads for _ in range(size)]
    got = decoder.forward(
        Rows(torch.tensor([ids]), (length,), latent_br, states),
        given_blocks,
        Latents(latents, patches.counts),
        None,
    )
    sequence = torch.tensor([*ids, *(token for block in blocks for token in block)])
    inputs = states[0] if states is not None else decoder.embed.weight[sequence]
    positions = [*range(length), *(start + j for start in starts for j in range(size))]
    mask = naive.square_mask(length, starts, size, decoder.window)
    want = naive.decode(decoder, inputs, positions, reads, latents[0], mask)
    assert_close(got.clean.logits[0], want[:length], **TOLERANCE)
    if blocks:
        assert_close(got.blocks.logits[0].flatten(0, 1), want[length:], **TOLERANCE)


@pytest.mark.parametrize("with_clean_rows", [False, True])
@pytest.mark.parametrize("index", [i for i in range(9) if models.model(i).decoder.denoises])
def test_a_pass_computes_blocks_of_the_texts_that_take_part_alone(index, with_clean_rows):
    """One of four: its logits are what it has among all, and rows of no other are multiplied."""
    model, size = models.model(index), 6
    texts = [random_ids(model, length, length) for length in (9, 30, 4, 17)]

    def opened():
        state = DecodeState(model, [ids[1:] for ids in texts], [100] * 4)
        state.next_logits([1] * 4)
        if with_clean_rows:
            state.append([[101]] * 4)
        block = state.open_block(size, start="frontier", closure="none")
        for row, ids in enumerate(block.ids):
            ids[:] = noise(model, texts[row], len(texts[row]), size, Random(row))
        return state, block

    state, block = opened()
    whole = state.denoise(block)
    state, block = opened()
    multiplied = []
    hook = model.decoder.layers[0].mlp.register_forward_hook(
        lambda _module, given, _output: multiplied.append(given[0].shape)
    )
    try:
        some = state.denoise(block, [False, True, False, False])
    finally:
        hook.remove()
    assert (1, 1, size) in [shape[:3] for shape in multiplied if len(shape) == 4]
    assert not any(len(shape) == 4 and shape[0] > 1 for shape in multiplied)
    same_logits(model, some[1], whole[1])
