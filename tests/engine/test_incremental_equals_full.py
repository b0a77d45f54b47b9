"""Invariant 2: logits after any operations equal the plain reference on the prefix."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt_core.decoding.state import DecodeState
from blt_core.nn.cache import ring_size
from blt_core.testing.reference import block_logits, row_logits, true_flags
from tests.engine import models
from tests.engine.programs import Machine, same_logits
from tests.engine.seen import saw
from tests.engine.strategies import denoising_indices, examples, model_indices, programs, prompts
from tests.nightly import nightly_or


@examples(150)
@given(model_indices, st.lists(prompts(), min_size=1, max_size=3), programs())
def test_any_program_equals_the_reference(index, texts, program):
    machine = Machine(models.model(index), texts, models.shape(index).decoder_window)
    machine.run(program)


@examples(80)
@given(denoising_indices, st.lists(prompts(), min_size=1, max_size=3), programs(longest=20))
def test_programs_after_a_first_pass_equal_the_reference(index, texts, program):
    machine = Machine(models.model(index), texts, models.shape(index).decoder_window)
    machine.next(Random(1))
    machine.run(program)


FORCED = ("frontier", "forced")


@pytest.mark.parametrize("index", models.DENOISING[:9])
def test_a_block_leaves_no_trace_when_its_text_goes_on(index):
    """Forced blocks, then drafts, appended bytes, rewinds to and into a patch, other blocks."""
    steps = "next block draft append block append draft block rewind block next rewind draft"
    for number in range(12):
        machine = Machine(models.model(index), [b"", b"trace of a block"], None)
        machine.next(Random(0))
        machine.run([(name, 31 * number + i) for i, name in enumerate(steps.split())])


#: Bytes of a long text: many times what any window of the pool holds.
LONG = nightly_or(160, 320)


@pytest.mark.parametrize("index", range(16))
def test_long_texts_byte_by_byte_equal_the_full_forward(index):
    """Settled every byte, so that windows drop what lies behind; one row ends early."""
    model, rng = models.model(index), Random(index)
    ids = [model.scheme.bos, *(rng.choice((32, 97, rng.randrange(256))) for _ in range(LONG))]
    flags = true_flags(model, ids)
    want = row_logits(model, ids, flags)
    prompt = 80 if index % 4 == 1 else 5  # of the former a window keeps the end alone
    state = DecodeState(model, [ids[1:prompt], ids[1:2]], [400, 400])
    window = models.shape(index).decoder_window
    ring, short, new = ring_size(window or 0), 20, 1
    saw("a prompt longer than a ring", window and prompt > ring)
    many = 2 * ring  # of which a true pass reads all at once, amid the text
    while (n := state.lengths[0]) < len(ids):
        on = state.lengths[1] < short
        got = state.next_logits([new, int(on)])
        same_logits(model, got[0, :new], want[n - new : n])
        if on:
            same_logits(model, got[1, 0], want[state.lengths[1] - 1])
        if model.decoder.denoises and (n % 13 == 0 or 0 < n % ring < 4):
            start = _check_blocks(state, model, ids[:n], flags[: n + 1], n)
            inside = window and start > window
            across = inside and (start - window) // ring != (start - 1) // ring
            saw("a block whose window lies across the end of a ring", across)
        step = 1 + n % 3
        if n > short and many:
            step, many = many, 0
            saw("rows for two rings at once")
        new = min(step, len(ids) - n)
        state.append([ids[n : n + new], ids[state.lengths[1] :][: int(on)]])
        state.settle()


@pytest.mark.parametrize("index", models.DENOISING[:9])
def test_blocks_beside_long_prompts_that_windows_keep_the_end_of(index):
    """Read by a forced block or a true pass; texts that are alike, and one that is read later."""
    text, window = (
        bytes(Random(index).choices(b"ab 1(\n", k=130)),
        models.shape(index).decoder_window,
    )
    for number in range(4):
        machine = Machine(models.model(index), [text, b"ab ", text, text[:70]], window)
        saw("a forced block on a prompt longer than a ring", window)
        first = "block" if number % 2 else "next"
        steps = f"{first} block draft append block rewind next settle append block draft next block"
        machine.run([(name, 31 * number + i) for i, name in enumerate(steps.split())])


def _check_blocks(state, model, ids, flags, number):
    """A block at each kind of start on the long row, the short one idle; where it starts."""
    start, closure = (("aligned", "none"), FORCED, ("frontier", "none"))[number // 13 % 3]
    block = state.open_block(12, start=start, closure=closure, active=[True, False])
    got = state.denoise(block)[0]
    if closure == "forced":
        flags = [*flags[:-1], True]
    want = block_logits(model, ids, flags, block.ids[0], block.start[0])
    same_logits(model, got, want)
    return block.start[0]
