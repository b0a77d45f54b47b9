"""Ends of a text, outputs that never happen, misuse of operations, and how ids are drawn."""

from __future__ import annotations

from copy import deepcopy

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from blt_core.decoding.engine import Progress, Request, Text, decode, end
from blt_core.decoding.state import DecodeState
from blt_core.errors import EngineError, RequestError
from blt_core.testing.reference import true_flags
from blt_core.types import Draws, Passes, Round, Sampling
from blt_plugins.verification.greedy import GreedyParams, GreedyVerification
from tests.engine import models
from tests.engine.drafters import BlockSteps, Oracle
from tests.engine.programs import watched
from tests.engine.runs import GREEDY, Traced, ar, ar_alone, ar_ids, run, self_drafter, speculative
from tests.engine.strategies import batches, denoising_indices, drafters, examples, model_indices

# -- where a text ends ------------------------------


@examples(60)
@given(st.data(), model_indices)
def test_nothing_follows_the_first_end_and_no_end_is_exceeded(data, index):
    batch = data.draw(batches(index))
    sampler = speculative(data.draw(drafters(index, batch)))
    for request, done in zip(batch, run(models.model(index), sampler, batch), strict=True):
        output = bytes(done.output)
        assert output == models.model(index).scheme.decode(done.ids)
        assert len(done.ids) <= request.max_new_bytes
        assert (done.stop_reason == "length") <= (len(done.ids) == request.max_new_bytes)
        for stop in request.stop:
            at = output.find(stop)
            assert at < 0 or (done.stop_reason == "stop" and at + len(stop) == len(output))


@examples(40)
@given(st.data(), model_indices)
def test_each_step_streams_the_bytes_that_the_record_gains(data, index):
    batch = data.draw(batches(index))
    streamed = [b"" for _ in batch]
    sampler = speculative(data.draw(drafters(index, batch)))
    for step in decode(models.model(index), sampler, batch, GREEDY):
        streamed = [old + new for old, new in zip(streamed, step.new, strict=True)]
        assert streamed == [bytes(progress.output) for progress in step.progress]


def ended(index):
    """A request that AR ends by EOS on model ``index``, or None."""
    for seed in range(40):
        request = Request(bytes([seed, 65 + seed]), 40)
        if (
            ar_alone(index, request).stop_reason == "eos"
            and len(ar_alone(index, request).output) > 1
        ):
            return request
    return None


EOS_MODELS = [i for i in range(models.COUNT) if models.shape(i).eos_scale > 1]


@pytest.mark.parametrize("index", EOS_MODELS)
def test_eos_inside_an_accepted_draft_ends_the_text_and_is_no_part_of_it(index):
    request = ended(index)
    assert request is not None
    want = ar_alone(index, request)
    drafter = Oracle({(): ar_ids(index, request)}, 16, errors=0.0, seed=0)
    got = run(models.model(index), speculative(drafter), [request])[0]
    assert got.stop_reason == "eos"
    assert bytes(got.output) == bytes(want.output)
    assert got.accepted <= min(got.drafted - 1, len(got.ids))  # EOS was drafted, and is no output
    # EOS is not part of max_new_bytes: with exactly as much room as the text needs, length ends it.
    tight = Request(request.prompt, len(want.output))
    for sampler in (ar(), speculative(drafter)):
        done = run(models.model(index), sampler, [tight])[0]
        assert (bytes(done.output), done.stop_reason) == (bytes(want.output), "length")


def after(model, ids, room, stop):
    """The progress of a request that has output ``ids``."""
    shown = bytearray(model.scheme.decode(ids))
    request = Request(b"", room, stop)
    return Progress(request, length=len(ids), text=Text(list(ids), shown), shown=len(shown))


def test_end_rules_drop_what_follows_the_first_of_eos_stop_and_length():
    model = models.model(0)
    eos = model.scheme.eos

    def ending(output, ids, room=9, stop=()):
        before = model.scheme.encode(output)
        kept, reason = end(after(model, before, room, stop), ids, model.scheme)
        return model.scheme.decode(kept), reason

    assert ending(b"", [97, eos, 98, eos]) == (b"a", "eos")
    assert ending(b"", [eos]) == (b"", "eos")
    assert ending(b"ab", [99, 100, 101], room=4) == (b"cd", "length")
    assert ending(b"a", [98, 99, 100], stop=(b"bc",)) == (b"bc", "stop")
    assert ending(b"a", [98, 99], stop=(b"ab",)) == (b"b", "stop")  # begun before this round
    assert ending(b"", [97, 98, eos], stop=(b"b",)) == (b"ab", "stop")  # before EOS
    assert ending(b"", [97, eos, 98], stop=(b"b",)) == (b"a", "eos")  # never reached
    assert ending(b"", [97, 98, 99], room=2, stop=(b"c",)) == (b"ab", "length")
    assert ending(b"", [97, 98, 99], room=3, stop=(b"abc", b"b")) == (b"ab", "stop")
    assert ending(b"a", [98, 99]) == (b"bc", None)


def test_special_ids_of_the_output_have_room_like_bytes_and_end_with_a_stop_string():
    model = models.model(SPECIAL)
    bos = model.scheme.bos

    def ending(before, ids, room=9, stop=()):
        return end(after(model, before, room, stop), ids, model.scheme)

    assert ending([bos, 97], [bos, 98, bos], room=4) == ([bos, 98], "length")
    assert ending([97], [bos, 98, bos, 99], stop=(b"ab",)) == ([bos, 98], "stop")
    assert ending([bos], [bos, bos]) == ([bos, bos], None)


SPECIAL = next(i for i in range(models.COUNT) if models.shape(i).outputs_specials)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_a_model_may_output_special_ids_but_never_mask(count):
    model = deepcopy(models.model(SPECIAL))
    head = model.decoder.head.weight
    head[model.scheme.mask] = 30 * head[:256].mean(0) + 30 * head[65]
    head[model.scheme.bos] *= 3
    want = run(model, ar(), [Request(b"x", 40)])[0]
    got = run(model, speculative(self_drafter(count)), [Request(b"x", 40)])[0]
    assert got.ids == want.ids
    assert model.scheme.mask not in got.ids
    assert model.scheme.bos in got.ids
    assert got.output == bytes(token for token in got.ids if token < 256)


# -- what is refused before any work ------------------------------


def refused(model, sampler, requests, sampling=GREEDY, match=""):
    """``decode`` raises at once, and no part of the model ran."""
    spied, log = watched(model)
    with pytest.raises(RequestError, match=match):
        decode(spied, sampler, requests, sampling)
    assert log.total == Passes()


@pytest.mark.parametrize(
    ("requests", "match"),
    [
        ([], "no prompts"),
        ([Request(b"a", 0)], "max_new_bytes"),
        ([Request(b"a", 5, (b"x", b""))], "stop"),
        ([Request(b"a", 5), Request(bytes(580), 21)], "prompt 2.*context of 600 bytes"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_before_any_work(requests, match):
    refused(models.model(0), ar(), requests, match=match)


def test_greedy_verification_refuses_temperature_before_any_work():
    greedy = GreedyVerification(GreedyParams(), models.CONTEXT)
    sampler = speculative(self_drafter(4), greedy)
    refused(models.model(0), sampler, [Request(b"a", 5)], Sampling(1.0), "temperature 0")


def test_a_request_that_just_fits_the_context_is_served():
    model = attrs.evolve(models.model(3), context_bytes=24)
    for sampler in (ar(), speculative(self_drafter(16))):
        assert len(run(model, sampler, [Request(bytes(20), 4)])[0].output) <= 4


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
    ],
)
def test_impossible_sampling_is_refused(setting):
    with pytest.raises(RequestError):
        Sampling(**setting)


# -- ids that are never output ------------------------------


@pytest.mark.parametrize("index", models.DENOISING[:5])
@pytest.mark.parametrize("special", ["mask", "bos"])
def test_mask_and_bos_are_never_output_however_probable(index, special):
    model = deepcopy(models.model(index))
    token = getattr(model.scheme, special)
    head = model.decoder.head.weight
    head[token] = 30 * head[:256].mean(0) + 30 * head[65]
    state = DecodeState(model, [[1]], [9])
    assert not state.next_logits([1])[0, 0, list(model.scheme.never_output)].isfinite().any()
    samplers = [(ar(), GREEDY), (ar(), Sampling(5.0)), (speculative(self_drafter(5)), GREEDY)]
    samplers += [(speculative(BlockSteps(5, 1, "aligned", "none")), GREEDY)]
    for sampler, sampling in samplers:
        trace = Traced(sampler)
        run(model, trace, [Request(b"x", 12), Request(b"", 12)], sampling)
        for _, done in trace.rounds:
            for ids in done.ids:
                assert all(model.scheme.is_byte(t) or t == model.scheme.eos for t in ids)


# -- operations against their contract ------------------------------


def fresh(index=0, prompts=(b"abcdef", b"xy")):
    """A state that has computed nothing."""
    model = models.model(index)
    return DecodeState(model, [model.scheme.encode(p) for p in prompts], [50] * len(prompts))


def test_drafting_on_a_fresh_state_raises():
    state = fresh()
    assert state.fresh
    with pytest.raises(EngineError, match="first true pass"):
        state.draft_logits([1, 1])
    for start in ("aligned", "frontier"):
        with pytest.raises(EngineError, match="first true pass"):
            state.denoise(state.open_block(6, start=start))
    assert state.passes(0) == state.calls == Passes()
    state.next_logits([1, 1])
    assert not state.fresh
    state.draft_logits([1, 1])


def test_drafting_on_a_row_that_never_had_a_pass_raises():
    state = fresh()
    state.next_logits([1, 0])
    state.draft_logits([1, 0])
    with pytest.raises(EngineError, match="first true pass"):
        state.draft_logits([0, 1])
    with pytest.raises(EngineError, match="first true pass"):
        state.denoise(state.open_block(6, start="frontier"))


def test_drafting_after_a_forced_block_on_an_empty_prompt_raises():
    state = fresh(prompts=(b"",))
    with pytest.raises(EngineError, match="first true pass"):
        state.denoise(state.open_block(3, start="frontier", closure="forced"))
    state.denoise(state.open_block(3, start="frontier", closure="forced", scored=True))
    state.append([[1, 2, 3]])
    with pytest.raises(EngineError, match="first true pass"):
        state.draft_logits([1])


@examples(20)
@given(model_indices, st.binary(min_size=1, max_size=20))
def test_rewinding_below_what_is_settled_raises(index, prompt):
    state = fresh(index, (prompt,))
    with pytest.raises(EngineError, match="settled"):
        state.rewind([0])
    state.next_logits([1])
    state.append([[*b" and more"]])
    state.next_logits([1])
    flags, end = true_flags(models.model(index), state.text(0)), len(prompt) + 10
    for most in (len(prompt) + 1, end):  # the prompt settles as it is read, the rest if asked to
        opened = max(i for i in range(most) if flags[i])
        kept = max(opened + 1, len(prompt) + 1)
        for length in range(kept):
            with pytest.raises(EngineError, match=f"the first {kept} are settled"):
                state.rewind([length])
        assert state.lengths == (end,)
        if opened:
            with pytest.raises(EngineError, match=f"rows before {opened} are settled"):
                state.next_logits([end - opened + 1])
        state.settle()
    for length in range(end, kept - 1, -1):
        state.rewind([length])
        state.next_logits([1])


def test_a_rewind_that_is_refused_changes_no_row():
    state = fresh()
    state.next_logits([1, 1])
    state.settle()
    texts = state.text(0), state.text(1)
    with pytest.raises(EngineError, match="batch row 1"):
        state.rewind([len(texts[0]) - 0, 0])
    assert (state.text(0), state.text(1)) == texts


def test_a_stale_block_raises():
    state = fresh()
    state.next_logits([1, 1])
    for start, closure in (("aligned", "none"), ("frontier", "none"), ("frontier", "forced")):
        block = state.open_block(8, start=start, closure=closure)
        state.append([[], [65]])
        with pytest.raises(EngineError, match="changed since"):
            state.denoise(block)
        state.rewind([n - int(b == 1) for b, n in enumerate(state.lengths)])
        state.append([[], [66]])  # as long as it was, yet another text
        with pytest.raises(EngineError, match="changed since"):
            state.denoise(block)
        state.denoise(state.open_block(8, start=start, closure=closure))


def test_passes_without_rows_or_with_too_many_raise():
    state = fresh()
    for rows in ([0, 0], [9, 1], [1, -1]):
        with pytest.raises(EngineError):
            state.next_logits(rows)
    assert state.calls == Passes()
    state.next_logits([1, 1])
    with pytest.raises(EngineError):
        state.draft_logits([0, 0])
    with pytest.raises(EngineError, match="no batch row"):
        state.denoise(state.open_block(4, start="frontier", active=[False, False]))


def test_blocks_need_a_decoder_that_denoises():
    index = next(i for i in range(models.COUNT) if i not in models.DENOISING)
    with pytest.raises(EngineError, match="cannot denoise"):
        fresh(index).open_block(4, start="frontier")


def test_a_sampler_that_commits_nothing_is_caught():
    class Idle:
        def check(self, sampling):
            """Serves all."""

        def round(self, ops, sampling, draws):
            """Commits nothing."""
            return Round([[] for _ in ops.lengths], [0], [0])

    with pytest.raises(EngineError, match="committed nothing"):
        list(decode(models.model(0), Idle(), [Request(b"", 3)], GREEDY))


# -- how ids are drawn ------------------------------

weights = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=2, max_size=12).flatmap(
    lambda values: st.permutations([float("-inf"), *values])
)


@examples(100)
@given(
    weights,
    st.floats(0.1, 4.0),
    st.one_of(st.none(), st.integers(1, 14)),
    st.one_of(st.none(), st.floats(0.05, 1.0)),
)
def test_probabilities_are_temperature_then_top_k_then_top_p(logits, temperature, top_k, top_p):
    scaled = torch.tensor(logits, dtype=torch.float64) / temperature
    kept = set(range(len(logits)))
    if top_k is not None and top_k < len(logits):
        kept = set(sorted(kept, key=lambda i: (-logits[i], i))[:top_k])  # of equals the lowest ids
    masses = [float(scaled[i].exp()) if i in kept else 0.0 for i in range(len(logits))]
    probs = [mass / sum(masses) for mass in masses]
    if top_p is not None:
        head, total = set(), 0.0
        for i in sorted(kept, key=lambda i: (-probs[i], i)):
            if abs(total - top_p) < 1e-9:
                return
            if total >= top_p:
                break
            head.add(i)
            total += probs[i]
        probs = [p / total if i in head else 0.0 for i, p in enumerate(probs)]
    got = Sampling(temperature, top_k, top_p).probabilities(torch.tensor(logits))
    want = torch.tensor(probs, dtype=torch.float64)
    assert_close(got, want, rtol=0.0, atol=1e-9)


def test_greedy_is_a_point_mass_on_the_lowest_best_id():
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 0.0]])
    want = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    assert_close(Sampling().probabilities(logits), want, rtol=0.0, atol=0.0)
    picked = Sampling().pick(logits, [4, 4], [1, 0], Draws((0, 0)))
    assert picked == [1, -1]


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**40), st.integers(0, 3), st.integers(0, 5))
def test_draws_depend_on_seed_position_and_stream_alone(seed, position, stream, row):
    want = Draws((seed,)).uniform(0, position, stream)
    assert 0.0 <= want < 1.0
    seeds = tuple(seed if i == row else i for i in range(6))
    assert Draws(seeds).uniform(row, position, stream) == want
    assert Draws((seed,)).uniform(0, position + 1, stream) != want
    assert Draws((seed,)).uniform(0, position, stream + 1) != want
    assert Draws((seed + 1,)).uniform(0, position, stream) != want


@examples(20)
@given(denoising_indices, st.integers(2, 8))
def test_a_block_shows_committed_bytes_then_masks(index, size):
    state = fresh(index)
    state.next_logits([1, 1])
    for start in ("aligned", "frontier"):
        block = state.open_block(size, start=start)
        for b, (ids, at, given_) in enumerate(
            zip(block.ids, block.start, block.given, strict=True)
        ):
            assert at + given_ == state.lengths[b]
            assert ids[:given_] == state.text(b)[at:]
            assert set(ids[given_:]) == {state.scheme.mask}
            assert len(ids) == size
            assert size - given_ >= 2
