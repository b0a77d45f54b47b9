"""Block diffusion: BLT-DV and cascade give AR's bytes, BLT-D what its definition says."""

from __future__ import annotations

from itertools import combinations

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_core.protocols import Unmasking
from blt_core.testing.reference import block_logits, row_logits, true_flags
from blt_core.types import FREE_STREAM, Draws, Sampling
from blt_plugins.sampling.diffusion import BlockDiffusion, BlockDiffusionParams
from blt_plugins.unmasking.composed import (
    AnyOf,
    AnyOfParams,
    AtMost,
    AtMostParams,
    LeftToRight,
    LeftToRightParams,
)
from blt_plugins.unmasking.rules import (
    Confidence,
    ConfidenceParams,
    EntropyBound,
    EntropyBoundParams,
    FillAll,
)
from tests.engine import models
from tests.engine.drafters import Recorded
from tests.engine.runs import (
    Traced,
    ar_alone,
    cascade_drafter,
    counts,
    rows_of,
    run,
    self_drafter,
    speculative,
)
from tests.engine.strategies import (
    batches,
    denoising_indices,
    diffusion_drafters,
    examples,
    rules,
    simple_rules,
)

C = models.CONTEXT


@attrs.define
class Counted:
    """A drafter that notes the decoder passes of each of its drafts (of batch row 0)."""

    inner: object
    passes: list = attrs.field(factory=list)

    def draft(self, ops, limit, sampling, draws):
        before = ops.passes(0)
        drafted = self.inner.draft(ops, limit, sampling, draws)
        self.passes.append((before, ops.passes(0)))
        return drafted


@examples(100)
@given(st.data(), denoising_indices, diffusion_drafters())
def test_blt_dv_equals_ar(data, index, drafter):
    batch = data.draw(batches(index))
    done = run(models.model(index), speculative(drafter), batch)
    for request, got in zip(batch, done, strict=True):
        want = ar_alone(index, request)
        assert (bytes(got.output), got.stop_reason) == (bytes(want.output), want.stop_reason)


@examples(60)
@given(st.data(), denoising_indices, diffusion_drafters(), st.integers(1, 16))
def test_cascade_drafts_byte_for_byte_what_self_drafts(data, index, inner, count):
    batch = data.draw(batches(index))
    records = []
    for drafter in (cascade_drafter(count, inner), self_drafter(count)):
        recorded = Recorded(drafter)
        trace = Traced(speculative(recorded))
        done = run(models.model(index), trace, batch)
        outputs = [(bytes(row.output), row.stop_reason) for row in done]
        records.append((rows_of(trace, recorded, len(batch)), outputs))
    assert records[0] == records[1]


@examples(60)
@given(st.data(), denoising_indices, diffusion_drafters())
def test_passes_of_blt_dv_and_cascade_have_their_closed_forms(data, index, drafter):
    [request] = data.draw(batches(index, rows=1))
    counted = Counted(drafter)
    [done] = run(models.model(index), speculative(counted), [request])
    drafts = [after.decoder - before.decoder for before, after in counted.passes]
    # One pass reads the prompt, then each round drafts (if it has room to) and verifies.
    assert done.passes.decoder == 1 + sum(drafts) + done.rounds
    closures = [after.encoder - before.encoder for before, after in counted.passes]
    forced = drafter.start == "frontier" and drafter.closure == "forced"
    assert set(closures) <= ({0, 1} if forced else {0})
    assert done.passes.encoder <= 1 + done.rounds + sum(closures)
    assert all(after.scorer == before.scorer for before, after in counted.passes)
    if isinstance(drafter.unmasking, FillAll):
        assert set(drafts) <= {1}


@examples(30)
@given(st.data(), denoising_indices, diffusion_drafters(), st.integers(1, 16))
def test_cascade_runs_no_scorer_and_closes_patches_only_where_its_inner_drafter_does(
    data, index, inner, count
):
    [request] = data.draw(batches(index, rows=1))
    counted = Counted(cascade_drafter(count, inner))
    [done] = run(models.model(index), speculative(counted), [request])
    forced = inner.start == "frontier" and inner.closure == "forced"
    if not forced:
        assert done.passes.encoder <= 1 + done.rounds
        assert all(after.scorer == before.scorer for before, after in counted.passes)


# -- BLT-D ---------------------------------------------------------------------------------------


CLOSURES = st.sampled_from(["forced", "none"])


#: Probabilities below which a byte ends its block; 0: never.
BOUNDS = st.sampled_from([0.0, 0.02, 0.1, 0.3, 1.0])


def blt_d(size: int, unmasking: Unmasking, closure: str = "forced", **keys) -> BlockDiffusion:
    params = BlockDiffusionParams(block_bytes=size, unmasking=unmasking, closure=closure, **keys)
    return BlockDiffusion(params, C)


class DefinedBlock:
    """A block after ``ids``, filled by the definition over the plain reference."""

    def __init__(self, model, ids: list[int], flags: list[bool], size: int) -> None:
        self.model, self.text, self.flags = model, ids, flags
        self.ids = [model.scheme.mask] * size
        self.likely, self.passes = [1.0] * size, 0

    def fill(self, unmasking: Unmasking, draws: Draws) -> None:
        scheme = self.model.scheme
        while scheme.mask in self.ids:
            self.passes += 1
            logits = block_logits(self.model, self.text, self.flags, self.ids, len(self.text))
            logits = logits.clone()
            logits[:, list(scheme.never_output)] = float("-inf")
            probs = logits.double().softmax(-1)
            masked = torch.tensor([[token == scheme.mask for token in self.ids]])
            places = unmasking.select(probs[None], masked, [len(self.text)], draws)[0]
            for place in places.nonzero().flatten().tolist():
                self.ids[place] = int(logits[place].argmax())
                self.likely[place] = float(probs[place].max())

    def kept(self, bound: float, least: int) -> list[int]:
        unsure = [p for p, likely in enumerate(self.likely) if likely < bound and p >= least]
        return self.ids[: min([*unsure, len(self.ids)])]


def defined_blt_d(model, request, size, unmasking, closure, keep=0.0) -> tuple[bytes, int, int]:
    """(output, blocks, decoder passes) by the definition, over the plain reference."""
    scheme = model.scheme
    ids = [scheme.bos, *scheme.encode(request.prompt)]
    output, blocks, passes, draws = b"", 0, 0, Draws((request.seed,))
    while len(output) < request.max_new_bytes:
        flags, first = true_flags(model, ids), []
        if closure == "forced":
            flags[-1] = True
        else:
            passes += 1
            row = row_logits(model, ids, flags)[-1].clone()
            row[list(scheme.never_output)] = float("-inf")
            first = [int(row.argmax())]
            ids, flags = ids + first, [*flags, False]
        blocks += 1
        block = DefinedBlock(model, ids, flags, size - len(first))
        block.fill(unmasking, draws)
        passes += block.passes
        new = block.kept(keep, 1 - len(first))
        ids = ids + new
        if scheme.eos in first + new:
            output += scheme.decode((first + new)[: (first + new).index(scheme.eos)])
            break
        output += scheme.decode(first + new)
    return output[: request.max_new_bytes], blocks, passes


@examples(80)
@given(st.data(), denoising_indices, st.integers(1, 16), rules(), CLOSURES, BOUNDS)
def test_blt_d_does_what_its_definition_says(data, index, size, unmasking, closure, keep):
    [request] = data.draw(batches(index, rows=1, stops=False))
    model = models.model(index)
    [done] = run(model, blt_d(size, unmasking, closure, keep=keep), [request])
    output, blocks, passes = defined_blt_d(model, request, size, unmasking, closure, keep)
    assert bytes(done.output) == output
    assert (done.rounds, done.passes.decoder) == (blocks, passes)
    if closure == "forced":
        assert done.passes.encoder == blocks
    else:  # a block that closes no patch costs none
        assert done.passes.encoder <= blocks


@examples(60)
@given(
    st.data(),
    denoising_indices,
    st.integers(1, 9),
    rules(),
    st.sampled_from([0.0, 0.7, 1.3]),
    CLOSURES,
    BOUNDS,
)
def test_blt_d_in_a_batch_gives_what_each_request_gives_alone(
    data, index, size, unmasking, temperature, closure, keep
):
    batch = data.draw(batches(index))
    sampling = Sampling(temperature, top_p=0.9 if temperature else None)
    sampler = blt_d(size, unmasking, closure, keep=keep)
    together = run(models.model(index), sampler, batch, sampling)
    for request, got in zip(batch, together, strict=True):
        [alone] = run(models.model(index), sampler, [request], sampling)
        assert bytes(got.output) == bytes(alone.output)
        assert (counts(got.passes), got.rounds, got.stop_reason) == (
            counts(alone.passes),
            alone.rounds,
            alone.stop_reason,
        )


@examples(40)
@given(st.data(), denoising_indices, diffusion_drafters(), st.integers(0, 16))
def test_blt_dv_and_cascade_in_a_batch_give_what_each_request_gives_alone(
    data, index, inner, count
):
    batch = data.draw(batches(index))
    drafter = cascade_drafter(count, inner) if count else inner
    for request, got in zip(
        batch, run(models.model(index), speculative(drafter), batch), strict=True
    ):
        [alone] = run(models.model(index), speculative(drafter), [request])
        same, wanted = (
            (bytes(each.output), counts(each.passes), each.rounds, each.drafted, each.accepted)
            for each in (got, alone)
        )
        assert same == wanted


# -- unmasking -----------------------------------------------------------------------------------

masks = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3)


def beliefs(rows: int, seed: int) -> torch.Tensor:
    spread = torch.tensor([0.1, 1.0, 3.0, 10.0, 0.5])[:, None]
    noise = torch.randn(rows, 5, 7, generator=torch.Generator().manual_seed(seed))
    return (noise * spread).double().softmax(-1)


def chosen_by(rule: Unmasking, probs: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """What a rule fills of blocks that begin at their row's number."""
    rows = range(len(masked))
    return rule.select(probs, masked, list(rows), Draws(tuple(rows)))


@given(masks, st.integers(0, 99), rules())
def test_every_rule_fills_masked_bytes_only_and_at_least_one(rows, seed, rule):
    masked = torch.tensor(rows)
    chosen = chosen_by(rule, beliefs(len(rows), seed), masked)
    assert chosen.shape == masked.shape
    assert not bool((chosen & ~masked).any())
    assert torch.equal(chosen.any(-1), masked.any(-1))


@given(st.lists(st.booleans(), min_size=5, max_size=5), st.integers(0, 99), st.floats(0, 8))
def test_entropy_bound_fills_the_largest_set_of_least_entropy_within_gamma(row, seed, gamma):
    probs = beliefs(1, seed)
    entropy = [-(p * p.log()).sum().item() for p in probs[0]]
    masked = [i for i, on in enumerate(row) if on]
    rule = EntropyBound(EntropyBoundParams(gamma=gamma), C)
    chosen = [
        i for i, on in enumerate(chosen_by(rule, probs, torch.tensor([row]))[0].tolist()) if on
    ]
    fits = [
        subset
        for size in range(1, len(masked) + 1)
        for subset in combinations(masked, size)
        if sum(entropy[i] for i in subset) - max(entropy[i] for i in subset) <= gamma
    ]
    if not masked:
        assert chosen == []
        return
    assert len(chosen) == max(map(len, fits))
    assert sum(entropy[i] for i in chosen) == pytest.approx(
        sum(sorted(entropy[i] for i in masked)[: len(chosen)])
    )


@given(masks, st.integers(0, 99), simple_rules(), st.integers(1, 5))
def test_at_most_keeps_the_likeliest_of_what_is_chosen(rows, seed, inner, count):
    probs, masked = beliefs(len(rows), seed), torch.tensor(rows)
    rule = AtMost(AtMostParams(count=count, rule=inner), C)
    of_all, kept = chosen_by(inner, probs, masked), chosen_by(rule, probs, masked)
    for top, before, after in zip(probs.amax(-1), of_all, kept, strict=True):
        chosen = before.nonzero().flatten().tolist()
        best = sorted(chosen, key=lambda place: (-top[place], place))[:count]
        assert after.nonzero().flatten().tolist() == sorted(best)


@given(masks, st.integers(0, 99), simple_rules())
def test_left_to_right_goes_on_from_the_first_mask_until_the_inner_rule_stops(rows, seed, inner):
    probs, masked = beliefs(len(rows), seed), torch.tensor(rows)
    of_all = chosen_by(inner, probs, masked).tolist()
    rule = LeftToRight(LeftToRightParams(rule=inner), C)
    for row, wanted, got in zip(rows, of_all, chosen_by(rule, probs, masked).tolist(), strict=True):
        places = [place for place, on in enumerate(row) if on]
        expected = places[:1]
        for place in places[1:]:
            if not wanted[place]:
                break
            expected.append(place)
        assert [place for place, on in enumerate(got) if on] == expected


@given(masks, st.integers(0, 99), simple_rules(), simple_rules())
def test_any_of_is_the_union(rows, seed, one, other):
    probs, masked = beliefs(len(rows), seed), torch.tensor(rows)
    rule = AnyOf(AnyOfParams(rules={"a": one, "b": other}), C)
    both = chosen_by(one, probs, masked) | chosen_by(other, probs, masked)
    assert torch.equal(chosen_by(rule, probs, masked), both)


class Drawn:
    """Fills the masked byte that is drawn highest."""

    def select(self, probs_bBV, masked_bB, starts, draws):
        chosen = torch.zeros_like(masked_bB)
        for row, masked in enumerate(masked_bB.tolist()):
            drawn = {
                p: draws.uniform(row, starts[row] + p, FREE_STREAM)
                for p, on in enumerate(masked)
                if on
            }
            if drawn:
                chosen[row, max(drawn, key=drawn.__getitem__)] = True
        return chosen


@examples(30)
@given(st.data(), denoising_indices, st.integers(2, 9))
def test_a_rule_that_draws_gives_in_a_batch_what_it_gives_alone(data, index, size):
    batch = data.draw(batches(index))
    rule = AtMost(AtMostParams(count=2, rule=Drawn()), C)
    sampling = Sampling(0.8)
    together = run(models.model(index), blt_d(size, rule), batch, sampling)
    for request, got in zip(batch, together, strict=True):
        [alone] = run(models.model(index), blt_d(size, rule), [request], sampling)
        assert (bytes(got.output), got.passes) == (bytes(alone.output), alone.passes)


@given(st.lists(st.booleans(), min_size=5, max_size=5), st.integers(0, 99), st.floats(0, 1))
def test_confidence_fills_what_exceeds_alpha_else_the_best(row, seed, alpha):
    probs = beliefs(1, seed)
    top = probs[0].amax(-1).tolist()
    masked = [i for i, on in enumerate(row) if on]
    rule = Confidence(ConfidenceParams(alpha=alpha), C)
    chosen = chosen_by(rule, probs, torch.tensor([row]))[0]
    expected = {i for i in masked if top[i] > alpha} or (
        {max(masked, key=top.__getitem__)} if masked else set()
    )
    assert {i for i, on in enumerate(chosen.tolist()) if on} == expected
