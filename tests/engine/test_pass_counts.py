"""Invariant 6: N_dec is each sampler's closed form, N_enc what true flags of the rounds demand.

That no true row or closed patch is computed twice, and that drafts run the decoder alone, is
checked at each step of the programs in test_incremental_equals_full.py and, for whole runs, here.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from blt_core.decoding import engine
from blt_core.decoding.engine import Request, decode
from blt_core.decoding.rows import Tally
from blt_core.decoding.state import DecodeState
from blt_core.testing.reference import true_flags
from blt_core.types import Passes, Shape, Shapes
from blt_plugins.drafting.cascade import CascadeDrafter, CascadeParams
from blt_plugins.drafting.diffusion import DiffusionDrafter, DiffusionParams
from blt_plugins.unmasking.rules import FillAll
from tests.engine import models
from tests.engine.drafters import BlockSteps, Recorded
from tests.engine.programs import watched
from tests.engine.runs import (
    GREEDY,
    Traced,
    ar,
    expected_passes,
    observe,
    rows_of,
    run,
    self_drafter,
    speculative,
)
from tests.engine.strategies import (
    batches,
    block_drafters,
    denoising_indices,
    drafters,
    examples,
    model_indices,
)


def test_a_cascade_over_an_unclosed_block_encodes_as_seldom_as_blt_s():
    def encoded(drafter):
        [done] = run(models.model(0), speculative(drafter), [Request(b"abc", 40)])
        return bytes(done.output), done.passes.encoder

    def cascade(closure):
        inner = DiffusionParams(start="frontier", closure=closure, unmasking=FillAll(None, None))
        drafter = DiffusionDrafter(inner, models.CONTEXT)
        return CascadeDrafter(CascadeParams(draft_bytes=8, drafter=drafter), models.CONTEXT)

    expected = encoded(self_drafter(8))
    assert encoded(cascade("none")) == expected
    output, passes = encoded(cascade("forced"))
    assert output == expected[0]
    assert passes > 2 * expected[1]


def accepted_in(record, rounds):
    """Accepted ids that are in the output: none beyond an EOS, a stop string or the length."""
    left, count = len(record.ids), 0
    for turn in rounds:
        count += min(turn.accepted, left)
        left = max(left - turn.accepted - 1, 0)
    return count


def traced(index, batch, drafter):
    """(records, rounds) of each row of a verified run."""
    recorded = Recorded(drafter)
    trace = Traced(speculative(recorded))
    done = run(models.model(index), trace, batch)
    rows = rows_of(trace, recorded, len(batch))
    observe(index, batch, rows, done)
    for request, record, rounds in zip(batch, done, rows, strict=True):
        left = request.max_new_bytes
        for turn in rounds:  # one byte of what remains is the model's own
            assert len(turn.draft) <= left - 1
            left -= turn.accepted + 1
        assert record.rounds == len(rounds) - 1  # the first only reads the prompt
        assert record.drafted == sum(len(turn.draft) for turn in rounds)
        assert record.accepted == accepted_in(record, rounds)
    return done, rows


def shape(*passes):
    """The shape of passes of (rows, context)."""
    widths = Counter(rows for rows, _ in passes)
    return Shape(tuple(sorted(widths.items())), sum(context for _, context in passes))


def assert_shapes_add_up(passes):
    """Every pass has a shape."""
    shapes = passes.shapes
    assert shapes.decoder.passes + shapes.blocks.passes == passes.decoder
    assert shapes.encoder.passes == passes.encoder_bytes
    assert shapes.global_model.passes == passes.encoder
    assert shapes.scorer.passes == passes.scorer


@examples(40)
@given(st.data(), model_indices)
def test_ar_runs_the_decoder_once_a_byte_and_the_rest_once_a_closed_patch(data, index):
    model, batch = models.model(index), data.draw(batches(index))
    trace = Traced(ar())
    done = run(model, trace, batch)
    rows = rows_of(trace, None, len(batch))
    for request, record, rounds in zip(batch, done, rows, strict=True):
        assert record.passes.decoder == len(record.ids) + (record.stop_reason == "eos")
        want = expected_passes(model, request.prompt, rounds)
        assert record.passes.decoder == want.decoder
        assert record.passes.encoder == want.encoder
        assert record.passes.scorer == want.scorer
        reads = model.decoder.reads_byte_states
        assert record.passes.encoder_bytes == (want.decoder if reads else want.encoder)
        assert_shapes_add_up(record.passes)
        # The first pass reads BOS and the prompt, each later one the byte before its own.
        ids = [model.scheme.bos, *model.scheme.encode(request.prompt), *record.ids]
        ids = ids[: len(request.prompt) + record.passes.decoder]
        prompt, size = len(request.prompt) + 1, len(ids)
        every = shape((prompt, 0), *((1, at) for at in range(prompt, size)))
        assert record.passes.shapes.decoder == record.passes.shapes.scorer == every
        assert record.passes.shapes.blocks == Shape()
        flags = true_flags(model, ids)
        closed = [at for at in range(1, size + 1) if flags[at]]
        bytes_read = size if reads else closed[-1]
        assert record.passes.shapes.encoder.rows == bytes_read
        # Patches that the prompt closes are one pass, later ones a pass each.
        first = sum(at <= prompt for at in closed)
        later = ((1, n) for n in range(first, len(closed)))
        assert record.passes.shapes.global_model == shape((first, 0), *later)
        if not reads:
            begins = [0, *(at for at in closed if at >= closed[first - 1])]
            want_bytes = shape(*((b - a, a) for a, b in pairwise(begins)))
            assert record.passes.shapes.encoder == want_bytes


@examples(60)
@given(st.data(), model_indices, st.integers(1, 16))
def test_self_drafts_cost_one_decoder_pass_a_byte_and_at_most_one_encoder_pass_a_round(
    data, index, count
):
    model, batch = models.model(index), data.draw(batches(index))
    done, rows = traced(index, batch, self_drafter(count))
    for request, record, rounds in zip(batch, done, rows, strict=True):
        want = expected_passes(model, request.prompt, rounds)
        assert record.passes.decoder == 1 + sum(len(turn.draft) + 1 for turn in rounds[1:])
        assert record.passes.encoder == want.encoder <= 1 + record.rounds
        assert record.passes.scorer == want.scorer
        assert_shapes_add_up(record.passes)
        at, passes = len(request.prompt) + 1, [(len(request.prompt) + 1, 0)]
        for turn in rounds[1:]:
            passes += [(1, at + step) for step in range(len(turn.draft))]
            passes.append((len(turn.draft) + 1, at))
            at += turn.accepted + 1
        assert record.passes.shapes.decoder == shape(*passes)
        if model.decoder.reads_byte_states:
            assert record.passes.encoder_bytes == record.passes.decoder
        else:
            assert record.passes.encoder_bytes == want.encoder


@examples(40)
@given(st.data(), denoising_indices, block_drafters())
def test_block_drafts_cost_their_steps_and_an_encoder_pass_only_if_forced(data, index, drafter):
    model, batch = models.model(index), data.draw(batches(index))
    done, rows = traced(index, batch, drafter)
    for request, record, rounds in zip(batch, done, rows, strict=True):
        want = expected_passes(model, request.prompt, rounds)
        blocks = sum(bool(turn.draft) for turn in rounds)
        assert record.passes.decoder == len(rounds) + drafter.steps * blocks
        assert record.passes.encoder == want.encoder + blocks * (drafter.closure == "forced")
        assert_shapes_add_up(record.passes)
        assert record.passes.shapes.blocks.passes == drafter.steps * blocks
        # A block's first pass may run clean rows too; a forced one has the row before it.
        least = drafter.steps * drafter.size + (drafter.closure == "forced")
        assert record.passes.shapes.blocks.rows >= blocks * least
        if drafter.start == "aligned":
            assert record.passes.shapes.blocks.rows == blocks * least
        assert record.passes.scorer == want.scorer
        if drafter.closure == "none":
            assert record.passes.encoder <= 1 + record.rounds


@examples(40)
@given(st.data(), model_indices)
def test_any_drafter_leaves_verification_at_one_pass_a_round(data, index):
    model, batch = models.model(index), data.draw(batches(index))
    done, rows = traced(index, batch, data.draw(drafters(index, batch)))
    for request, record, rounds in zip(batch, done, rows, strict=True):
        want = expected_passes(model, request.prompt, rounds)
        assert record.passes.scorer == want.scorer == len(rounds)
        assert record.passes.encoder >= want.encoder


class LedgerState(DecodeState):
    """Fails if a true pass runs a true row or closed patch that stands already."""

    def __init__(self, *arguments, **keys):
        super().__init__(*arguments, **keys)
        self.log = self._model.decoder.log
        self.rows = [0] * len(self.lengths)
        self.patches = [0] * len(self.lengths)

    def next_logits(self, rows):
        """True rows go on where they ended, but for those that are asked for again."""
        self.log.clear()
        lengths, fresh = self.lengths, self.fresh
        out = super().next_logits(rows)
        if fresh:
            self.log.tell_each([(self.text(b), asked) for b, asked in enumerate(rows)])
        for b, asked in enumerate(rows):
            first, end = self.log.rows[0][b]
            assert first == end if not asked else first == min(self.rows[b], lengths[b] - asked)
            self.rows[b] = lengths[b] if asked else self.rows[b]
            if self.log.latents:
                first, end = self.log.latents[0][b]
                assert first == self.patches[b]
                self.patches[b] = end
        return out

    def denoise(self, block):
        """A forced block may run rows anew, and one provisional patch."""
        out = super().denoise(block)
        for b, ids in enumerate(block.ids):
            if ids and block.provisional:
                self.rows[b] = min(self.rows[b], self.lengths[b] - 1)
        return out

    def rewind(self, lengths):
        """What is rewound may run again."""
        super().rewind(lengths)
        self.rows = [min(n, at) for n, at in zip(self.rows, lengths, strict=True)]
        closed = [sum(self.flags(b)) - 1 for b in range(len(lengths))]
        self.patches = [min(n, at) for n, at in zip(self.patches, closed, strict=True)]


@examples(40)
@given(st.data(), model_indices)
def test_runs_compute_no_true_row_and_no_closed_patch_twice(data, index):
    batch = data.draw(batches(index))
    drafter = data.draw(drafters(index, batch))
    model, log = watched(models.model(index))
    with mock.patch.object(engine, "DecodeState", LedgerState):
        run(model, speculative(drafter), batch)
        run(model, ar(), batch)
    assert log.total.decoder > 0


@examples(15)
@given(st.data(), denoising_indices, st.integers(2, 9))
def test_a_round_of_an_aligned_block_costs_half_the_encoder_passes_of_a_forced_one(
    data, index, size
):
    batch = data.draw(batches(index))
    forced, _ = traced(index, batch, BlockSteps(size, 1, "frontier", "forced"))
    aligned, _ = traced(index, batch, BlockSteps(size, 1, "aligned", "none"))
    for two, one in zip(forced, aligned, strict=True):
        assert two.passes.encoder <= 1 + 2 * two.rounds
        assert one.passes.encoder <= 1 + one.rounds


def test_shapes_add_up_width_by_width():
    one = Passes(decoder=3, shapes=Shapes(decoder=Shape(((1, 2), (5, 1)), 30)))
    other = Passes(decoder=4, shapes=Shapes(decoder=Shape(((1, 1), (9, 3)), 12)))
    total = Shape(((1, 3), (5, 1), (9, 3)), 42)
    assert (one + other).shapes.decoder == total
    assert (total.passes, total.rows) == (7, 35)
    tally = Tally()
    tally.add(one)
    copied = tally.copy()
    copied.add(other)
    assert copied.passes == one + other
    assert tally.passes == one


@examples(20)
@given(st.data(), model_indices)
def test_calls_of_a_batch_have_the_rows_of_all_its_texts(data, index):
    batch, model = data.draw(batches(index, rows=3)), models.model(index)
    *_, last = decode(model, speculative(self_drafter(4)), batch, GREEDY)
    assert_shapes_add_up(last.calls)
    together = sum((record.passes for record in last.progress), Passes()).shapes
    # Texts that begin alike are read once; all other rows are there, in fewer passes.
    for part in ("decoder", "encoder", "global_model", "scorer"):
        each, calls = getattr(together, part), getattr(last.calls.shapes, part)
        assert calls.passes <= each.passes
        if len({request.prompt for request in batch}) == len(batch):
            assert (calls.rows, calls.context) == (each.rows, each.context)
