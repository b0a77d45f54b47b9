"""``DecodeOps.draft``: the same ids, passes and state as the loop over ``draft_logits``.

Where a look at numbers waits for a device, ids are read once, after all passes. That way is taken
here too, on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_core.component import BuildContext
from blt_core.decoding.drafting import draft_alone
from blt_core.decoding.passes import ModelPasses
from blt_core.decoding.state import DecodeState
from blt_core.errors import EngineError, RunError
from blt_core.model import Model
from blt_core.protocols import DecodeOps
from blt_core.published import SCALES
from blt_core.types import Draws, Output, Sampling
from blt_plugins.cost.per_pass import PerPass, PerPassParams
from blt_plugins.drafting.adaptive import Counted
from blt_plugins.drafting.forecast import Price
from tests.engine import models
from tests.engine.programs import same_logits
from tests.engine.runs import counts, self_drafter
from tests.engine.seen import saw
from tests.engine.strategies import examples, model_indices, prompts

samplings = st.sampled_from(
    [Sampling(), Sampling(0.5), Sampling(1.0), Sampling(1.0, top_k=5), Sampling(1.0, top_p=0.9)]
)


@attrs.frozen
class EndsOften:
    """A decoder that thinks more of EOS than the one in it."""

    inner: Any
    bonus: Callable[[], float]
    eos: int

    @property
    def denoises(self) -> bool:
        """As the inner one."""
        return self.inner.denoises

    @property
    def reads_byte_states(self) -> bool:
        """As the inner one."""
        return self.inner.reads_byte_states

    def new_cache(self, batch):
        """The inner one's."""
        return self.inner.new_cache(batch)

    def forward(self, clean, blocks, latents, cache):
        """EOS is likelier."""
        output = self.inner.forward(clean, blocks, latents, cache)
        logits = output.clean.logits.clone()
        logits[..., self.eos] += self.bonus()
        return attrs.evolve(output, clean=Output(logits, output.clean.hidden))


@attrs.frozen
class Case:
    """Texts that grow by bytes and drafts, all before they are compared."""

    model: Model
    texts: list[bytes]
    seeds: tuple[int, ...]
    new: list[list[int]]
    limits: list[list[int]]
    sampling: Sampling

    def begun(self, rows: Sequence[int]) -> DecodeState:
        """A state of some of the texts, of which a true pass has read the prompts."""
        encoded = [self.model.scheme.encode(self.texts[row]) for row in rows]
        state = DecodeState(self.model, encoded, [100] * len(rows))
        state.next_logits([1] * len(rows))
        state.append([self.new[row] for row in rows])
        return state

    def draft(
        self, rows: Sequence[int], op: Any
    ) -> tuple[DecodeState, list[list[list[int]]], list[list[int]]]:
        """The state after drafts by ``op``, their ids, and how much longer a row is after each."""
        state, draws = self.begun(rows), Draws(tuple(self.seeds[row] for row in rows))
        drafts, grown = [], []
        for limits in self.limits:
            before = state.lengths
            drafts.append(op(state, [limits[row] for row in rows], self.sampling, draws))
            grown.append([n - m for n, m in zip(state.lengths, before, strict=True)])
        return state, drafts, grown


@st.composite
def cases(draw: st.DrawFn, index: int, sampling: st.SearchStrategy[Sampling]) -> Case:
    """One to four texts; a second draft goes on where the first ended."""
    model, count = models.model(index), draw(st.integers(1, 4))
    bonus = draw(st.sampled_from([0.0, 0.0, 3.0, 6.0]))
    each = st.lists(st.integers(0, 9), min_size=count, max_size=count)
    byte = st.integers(0, 255)
    return Case(
        attrs.evolve(model, decoder=EndsOften(model.decoder, lambda: bonus, model.scheme.eos)),
        draw(st.lists(prompts(), min_size=count, max_size=count)),
        tuple(draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))),
        draw(st.lists(st.lists(byte, max_size=3), min_size=count, max_size=count)),
        draw(st.lists(each, min_size=1, max_size=2)),
        draw(sampling),
    )


def read_late():
    """As on a device that a look at numbers waits for."""
    return mock.patch.object(ModelPasses, "waits", new=True)


def after(state: DecodeState) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of drafts and of a true pass that go on from a state."""
    rows = [1] * len(state.lengths)
    drafted = state.draft_logits(rows)
    state.append([[97]] * len(rows))
    return drafted, state.next_logits([2] * len(rows))


def assert_same_text(one: DecodeState, other: DecodeState) -> None:
    """Equal texts and flags."""
    assert one.lengths == other.lengths
    for row in range(len(one.lengths)):
        assert one.text(row) == other.text(row)
        assert one.flags(row) == other.flags(row)


def assert_goes_on_alike(model: Model, one: DecodeState, other: DecodeState) -> None:
    """What follows is the same: caches hold the same rows."""
    assert_same_text(one, other)
    for got, want in zip(after(one), after(other), strict=True):
        same_logits(model, got, want)


def ended_early(case: Case, drafts: Sequence[list[list[int]]]) -> bool:
    """Whether an EOS ended a draft before its limit."""
    eos = case.model.scheme.eos
    return any(
        ids[-1:] == [eos] and len(ids) < most
        for draft, limits in zip(drafts, case.limits, strict=True)
        for ids, most in zip(draft, limits, strict=True)
    )


@examples(80)
@given(st.data(), model_indices)
def test_a_draft_has_the_ids_the_passes_and_the_state_of_the_loop(data, index):
    case = data.draw(cases(index, samplings))
    everyone = range(len(case.texts))
    state, drafts, grown = case.draft(everyone, DecodeState.draft)
    other, loop, _ = case.draft(everyone, DecodeOps.draft)
    assert drafts == loop
    assert grown == [[len(ids) for ids in draft] for draft in drafts]
    assert [state.passes(row) for row in everyone] == [other.passes(row) for row in everyone]
    assert state.calls == other.calls
    some = [min(each) == 0 < max(each) for each in case.limits]
    saw("a draft that some rows take no part in", any(some))
    saw("a draft of unequal lengths", any(len(set(each) - {0}) > 1 for each in case.limits))
    saw("EOS ends a draft before its limit", ended_early(case, drafts))
    assert_goes_on_alike(case.model, state, other)


@examples(50)
@given(st.data(), model_indices, st.booleans())
def test_a_draft_of_a_batch_is_that_of_its_rows_alone(data, index, late):
    case = data.draw(cases(index, samplings))
    with read_late() if late else nullcontext():
        together, drafts, _ = case.draft(range(len(case.texts)), DecodeState.draft)
        for row in range(len(case.texts)):
            alone, own, _ = case.draft([row], DecodeState.draft)
            assert [draft[row] for draft in drafts] == [ids for [ids] in own]
            # Shapes too: nothing is run anew for another row.
            assert together.passes(row) == alone.passes(0)


@examples(80)
@given(st.data(), model_indices)
def test_ids_that_are_read_late_are_those_of_the_loop_and_all_passes_that_ran_are_counted(
    data, index
):
    case = data.draw(cases(index, samplings))
    everyone = range(len(case.texts))
    with read_late():
        state, drafts, grown = case.draft(everyone, DecodeState.draft)
    other, loop, _ = case.draft(everyone, DecodeOps.draft)
    assert drafts == loop
    assert grown == [[len(ids) for ids in draft] for draft in drafts]
    saw("EOS in a draft that is read late", ended_early(case, drafts))
    saw("a sampled draft that is read late", not case.sampling.greedy)
    for row in everyone:
        asked = sum(limits[row] for limits in case.limits)
        kept = sum(len(draft[row]) for draft in drafts)
        got, want = counts(state.passes(row)), counts(other.passes(row))
        reads = case.model.decoder.reads_byte_states
        assert got.decoder == want.decoder + asked - kept
        assert got.encoder_bytes == want.encoder_bytes + (asked - kept if reads else 0)
        assert (got.encoder, got.scorer) == (want.encoder, want.scorer)
    longest = sum(max(limits) for limits in case.limits)
    assert state.calls.decoder == 1 + longest >= other.calls.decoder
    assert_goes_on_alike(case.model, state, other)


@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=5, top_p=0.9)])
def test_a_draft_that_is_no_numbers_is_an_error(sampling, late, first):
    model = models.model(0)
    passes = iter([0.0] * first + [float("nan")] * 9)
    decoder = EndsOften(model.decoder, passes.__next__, model.scheme.eos)
    state = DecodeState(attrs.evolve(model, decoder=decoder), [[97, 98]], [100])
    state.next_logits([1])
    with read_late() if late else nullcontext(), pytest.raises(RunError, match="are no numbers"):
        state.draft([4], sampling, Draws((0,)))


@examples(20)
@given(st.data(), model_indices)
def test_a_device_that_cannot_draw_takes_the_loop(data, index):
    case = data.draw(cases(index, samplings))
    everyone = range(len(case.texts))
    with read_late(), mock.patch.object(ModelPasses, "draws", new=False):
        state, drafts, _ = case.draft(everyone, DecodeState.draft)
    other, loop, _ = case.draft(everyone, DecodeOps.draft)
    assert drafts == loop
    if not case.sampling.greedy:
        assert state.calls == other.calls


def test_nothing_is_drafted_before_a_true_pass_and_nothing_runs_for_no_ids():
    state = DecodeState(models.model(0), [[97], [98]], [100, 100])
    assert state.draft([0, 0], Sampling(), Draws((0, 0))) == [[], []]
    with pytest.raises(EngineError, match="nothing can be drafted"):
        state.draft([0, 2], Sampling(), Draws((0, 0)))
    state.next_logits([1, 1])
    before = state.calls
    assert state.draft([0, 0], Sampling(), Draws((0, 0))) == [[], []]
    assert state.calls == before


# -- operations around others ----------------------------------------------------------------------


class Passing:
    """Operations around others, which pass on what they do not name."""

    def __init__(self, ops: DecodeOps) -> None:
        self.ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)


def certain(logits: torch.Tensor) -> torch.Tensor:
    """Logits that say 120."""
    return logits.index_fill(-1, torch.tensor(120), 1000.0)


class Biased(Passing):
    """A third party's: their decoder prefers a byte."""

    def draft_logits(self, rows: Sequence[int]) -> torch.Tensor:
        """The byte 120 is certain."""
        return certain(self.ops.draft_logits(rows))


class Noted(Passing):
    """A third party's that notes what is appended."""

    def __init__(self, ops: DecodeOps) -> None:
        super().__init__(ops)
        self.appended: list[int] = []

    def append(self, ids: Sequence[Sequence[int]]) -> None:
        """Of the first row."""
        self.appended.extend(ids[0])
        self.ops.append(ids)


class BiasedState(DecodeState):
    """A state with other draft passes, and the op of its parent."""

    def draft_logits(self, rows: Sequence[int]) -> torch.Tensor:
        """The byte 120 is certain."""
        return certain(super().draft_logits(rows))


def begun(kind: type[DecodeState] = DecodeState, index: int = 0) -> DecodeState:
    """A state that can draft."""
    state = kind(models.model(index), [[*b"ab ab"]], [100])
    state.next_logits([1])
    state.append([[97]])
    return state


def test_operations_around_others_draft_by_their_own_passes():
    asked = ([5], Sampling(), Draws((0,)))
    for ops in (Biased(begun()), begun(BiasedState)):
        draft = self_drafter(5).draft(ops, *asked)
        assert draft.ids == [[120] * 5]
    noted = Noted(begun())
    [ids] = draft_alone(noted, *asked)
    assert noted.appended == ids
    assert [ids] == begun().draft(*asked)


def test_a_state_drafts_by_its_own_operation():
    state = begun()
    with mock.patch.object(DecodeOps, "draft", side_effect=AssertionError("the loop ran")):
        assert len(self_drafter(4).draft(state, [4], Sampling(), Draws((0,))).ids[0]) == 4


@pytest.mark.parametrize("by_name", [True, False])
def test_passes_that_the_adaptive_drafter_counts_are_those_that_run(by_name):
    state = begun()
    price = Price(PerPass(PerPassParams(), BuildContext()), SCALES["3b"])
    counted, before = Counted(state, [0.0], price, 10.0), state.passes(0).decoder
    draft = counted.draft if by_name else lambda *asked: draft_alone(counted, *asked)
    draft([5], Sampling(), Draws((0,)))
    assert counted.passes == [state.passes(0).decoder - before] == [5.0]


@pytest.mark.parametrize("closure", ["forced", "none"])
def test_the_latent_of_a_forced_block_is_counted_once_a_row(closure):
    state = DecodeState(models.model(models.DENOISING[0]), [[*b"ab ab"]] * 2, [100] * 2)
    state.next_logits([1, 1])
    state.append([[97]] * 2)
    price = Price(PerPass(PerPassParams(), BuildContext()), SCALES["3b"])
    counted = Counted(state, [0.0, 0.0], price, 10.0)

    def ran():
        return [(state.passes(row).decoder, state.passes(row).encoder) for row in (0, 1)]

    before = ran()
    for _ in range(2):
        block = counted.open_block(4, start="frontier", closure=closure)
        for active in ([True, False], [True, True], [True, True]):
            counted.denoise(block, active)
    new = [(n - m, e - f) for (n, e), (m, f) in zip(ran(), before, strict=True)]
    assert counted.passes == [decoder + 10.0 * encoder for decoder, encoder in new]
    assert [encoder for _, encoder in new] == ([2, 2] if closure == "forced" else [0, 0])
