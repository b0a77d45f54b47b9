"""A pass sends what the host knows to the device in one tensor; a choice is read in one."""

from __future__ import annotations

import traceback
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from blt_core.decoding.passes import ModelPasses
from blt_core.decoding.state import DecodeState
from blt_core.errors import RunError
from blt_core.types import Draws, Sampling
from tests.engine import models, programs
from tests.engine.seen import saw
from tests.engine.strategies import examples, model_indices, prompts
from tests.engine.strategies import programs as steps

MADE = (torch.tensor, torch.as_tensor)
FROM_HOST = (Tensor.new_tensor, Tensor.cuda)
INDEXED = (Tensor.__getitem__, Tensor.__setitem__)
# Norms of one row read a number too (``__float__``), on a CPU alone.
READ = (Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.__bool__, Tensor.__int__)


class Copies(TorchFunctionMode):
    """Who makes tensors for a device of what the host has, and how often numbers are looked at."""

    def __init__(self):
        super().__init__()
        self.sent, self.read = [], 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Note a call, and run it."""
        kwargs = kwargs or {}
        moved = any(isinstance(each, torch.device) for each in (*args, *kwargs.values()))
        made = (moved and (func in MADE or func is Tensor.to)) or func in FROM_HOST
        if func in INDEXED:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            made = any(isinstance(each, list) for each in index)
        frames = traceback.extract_stack()[-4:-1] if made else []
        # A table of angles is made once, for all passes to come.
        if made and not any(at.name == "_angles" for at in frames):
            self.sent.append(" < ".join(f"{at.name}:{at.lineno}" for at in reversed(frames)))
        self.read += func in READ
        return func(*args, **kwargs)


class Watched(DecodeState):
    """A state whose operations are counted: a tensor for each pass at most."""

    def _counted(self, operation, *arguments, **keys):
        before, first = self.calls, self.fresh
        with Copies() as copies:
            given = operation(*arguments, **keys)
        after = self.calls
        passes = sum(
            getattr(after, field) - getattr(before, field)
            for field in ("scorer", "encoder_bytes", "encoder", "decoder")
        )
        texts = [tuple(self.text(row)) for row in range(len(self.lengths))]
        alike = len(set(texts)) < len(texts)
        if not (first and alike):  # where one is read for several, its caches are copied besides
            assert len(copies.sent) <= passes, copies.sent
            saw("a tensor for each pass", len(copies.sent) > 1)
        return given

    def next_logits(self, rows):
        """As it is, counted."""
        return self._counted(super().next_logits, rows)

    def draft_logits(self, rows):
        """As it is, counted."""
        return self._counted(super().draft_logits, rows)

    def denoise(self, block, active=None):
        """As it is, counted."""
        return self._counted(super().denoise, block, active)


@examples(60)
@given(model_indices, st.lists(prompts(), min_size=1, max_size=4), steps(), st.booleans())
def test_a_pass_sends_one_tensor(index, texts, program, late):
    if late:  # then drafts run passes that no loop would run; see test_drafts
        program = [step for step in program if step[0] != "write"]
    with (
        mock.patch.object(programs, "DecodeState", Watched),
        mock.patch.object(ModelPasses, "waits", new=True) if late else nullcontext(),
    ):
        programs.Machine(models.model(index), texts, None).run(program)


@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize("count", [1, 2])
def test_texts_that_go_on_byte_by_byte_over_turns_of_rings_send_one_tensor_a_pass(index, count):
    state = Watched(models.model(index), [[97 + row] for row in range(count)], [200] * count)
    for n in range(100):
        state.next_logits([1] * count)
        state.draft_logits([1] * count)
        state.append([[97 + n % 7]] * count)
        state.settle()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=9, top_p=0.9)])
@pytest.mark.parametrize("index", [2, 3])  # of 3 the decoder reads byte states
def test_a_draft_of_ragged_texts_sends_one_tensor_for_all_of_its_passes(index, sampling, late):
    state = DecodeState(models.model(index), [[97], [98] * 40, [99] * 9], [50] * 3)
    state.next_logits([1, 1, 1])
    with (
        mock.patch.object(ModelPasses, "waits", new=True) if late else nullcontext(),
        Copies() as copies,
    ):
        before = state.calls.decoder
        state.draft([5, 3, 6], sampling, Draws((0, 0, 0)))
        assert state.calls.decoder > before + 1
    noise = int(late and not sampling.greedy)
    assert len(copies.sent) == 2 + noise, "the first pass, all others, and what is drawn by"
    assert not late or copies.read == 1


def test_greedy_choices_and_what_is_no_number_are_read_at_once():
    logits = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]])
    with Copies() as copies:
        assert Sampling().picks(logits, [0], [2], Draws((0,))) == [[1, 0]]
    assert copies.read == 1
    logits[0, 1, 2] = float("nan")
    with pytest.raises(RunError, match="are no numbers"):
        Sampling().picks(logits, [0], [2], Draws((0,)))
