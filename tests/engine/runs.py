"""Whole runs: samplers, a record of each round, and what an oracle derives from it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import attrs

from blt_core.component import BuildContext
from blt_core.decoding.engine import Progress, Request, decode
from blt_core.model import Model
from blt_core.protocols import DecodeOps, Drafter, Sampler, Verification
from blt_core.testing.reference import patches_of, true_flags
from blt_core.types import Draws, Passes, Round, Sampling, Shapes
from blt_plugins.cost.per_pass import PerPass, PerPassParams
from blt_plugins.drafting.adaptive import AdaptiveDrafter, AdaptiveParams
from blt_plugins.drafting.cascade import CascadeDrafter, CascadeParams
from blt_plugins.drafting.first import FirstDrafter, FirstParams
from blt_plugins.drafting.lookup import LookupDrafter, LookupParams
from blt_plugins.drafting.model import ModelDrafter, ModelParams
from blt_plugins.drafting.self import SelfDrafter, SelfParams
from blt_plugins.drafting.until import UntilDrafter, UntilParams
from blt_plugins.sampling.autoregressive import Autoregressive, AutoregressiveParams
from blt_plugins.sampling.speculative import Speculative, SpeculativeParams
from blt_plugins.verification.replay import ReplayParams, ReplayVerification
from blt_plugins.verification.sampled import (
    BlockVerification,
    RejectionVerification,
    SampledParams,
)
from tests.engine import models
from tests.engine.drafters import Recorded
from tests.engine.seen import saw

GREEDY = Sampling()


def ar() -> Autoregressive:
    """The baseline."""
    return Autoregressive(AutoregressiveParams(), models.CONTEXT)


def speculative(drafter: Drafter, verification: Verification | None = None) -> Speculative:
    """A verified sampler around ``drafter``; by default it replays ``ar``."""
    verification = verification or ReplayVerification(ReplayParams(), models.CONTEXT)
    return Speculative(
        SpeculativeParams(drafter=drafter, verification=verification), models.CONTEXT
    )


def verified_in_law(name: str) -> Verification:
    """A verification that is equal to ``ar`` in law: ``rejection`` or ``block``."""
    make = {"rejection": RejectionVerification, "block": BlockVerification}[name]
    return make(SampledParams(), models.CONTEXT)


def self_drafter(count: int) -> SelfDrafter:
    """The drafter of BLT-S with k = ``count``."""
    return SelfDrafter(SelfParams(draft_bytes=count), models.CONTEXT)


def model_drafter(index: int, other: int, count: int) -> ModelDrafter:
    """A draft model for model ``index``: model ``other`` of the pool, which has the same ids."""
    context = BuildContext(models.model(index).scheme, lambda _: models.model(other))
    return ModelDrafter(ModelParams(checkpoint="other", draft_bytes=count), context)


def cascade_drafter(count: int, inner: Drafter) -> CascadeDrafter:
    """A cascade of k = ``count`` over ``inner``."""
    return CascadeDrafter(CascadeParams(draft_bytes=count, drafter=inner), models.CONTEXT)


def lookup_drafter(least: int, files: tuple[str, ...] = ()) -> LookupDrafter:
    """What followed the last ``least`` bytes and more."""
    params = LookupParams(min_bytes=least, max_bytes=least + 3, files=files)
    return LookupDrafter(params, models.CONTEXT)


def first_drafter(inner: Sequence[Drafter]) -> FirstDrafter:
    """The first of ``inner`` that proposes anything."""
    named = {f"drafter {number}": each for number, each in enumerate(inner)}
    return FirstDrafter(FirstParams(drafters=named), models.CONTEXT)


def until_drafter(probability: float, inner: Drafter) -> UntilDrafter:
    """``inner``, stopped below a probability."""
    return UntilDrafter(UntilParams(probability=probability, drafter=inner), models.CONTEXT)


def adaptive_drafter(
    most: int, inner: Drafter, latent_price: float = 5.0, *, stops: bool = True
) -> AdaptiveDrafter:
    """``inner``, asked for as many bytes as pay, at most so many; ``stops``: it can stop early."""
    cost = PerPass(PerPassParams(latent=latent_price), models.CONTEXT)
    params = AdaptiveParams(drafter=inner, max_bytes=most, cost=cost)
    nested = frozenset({"drafter.stops_early"} if stops else ())
    return AdaptiveDrafter(params, attrs.evolve(models.CONTEXT, nested=nested))


def counts(passes: Passes) -> Passes:
    """How many passes there were, without their shapes.

    In a batch a text may compute rows anew that another's forced block had dropped.
    """
    return attrs.evolve(passes, shapes=Shapes())


@attrs.frozen
class Traced:
    """A sampler whose rounds are kept: (rows that took part, the round)."""

    sampler: Sampler
    rounds: list[tuple[list[bool], Round]] = attrs.field(factory=list)

    def check(self, sampling: Sampling) -> None:
        """As the inner sampler."""
        self.sampler.check(sampling)

    def round(self, ops: DecodeOps, sampling: Sampling, draws: Draws) -> Round:
        """As the inner sampler."""
        active = [left > 0 for left in ops.remaining]
        done = self.sampler.round(ops, sampling, draws)
        self.rounds.append((active, done))
        return done


def run(
    model: Model, sampler: Sampler, requests: Sequence[Request], sampling: Sampling = GREEDY
) -> tuple[Progress, ...]:
    """Decode to the end; the record of each request."""
    progress: tuple[Progress, ...] = ()
    for step in decode(model, sampler, requests, sampling):
        progress = step.progress
    return progress


@lru_cache(maxsize=4096)
def ar_alone(index: int, request: Request, sampling: Sampling = GREEDY) -> Progress:
    """What AR gives one request alone, on model ``index`` of the pool."""
    return run(models.model(index), ar(), [request], sampling)[0]


def ar_ids(index: int, request: Request, sampling: Sampling = GREEDY) -> list[int]:
    """All ids of AR's finished text: BOS, prompt, output, EOS if that ended it."""
    scheme = models.model(index).scheme
    done = ar_alone(index, request, sampling)
    ended = [scheme.eos] if done.stop_reason == "eos" else []
    return [scheme.bos, *scheme.encode(request.prompt), *done.ids, *ended]


@attrs.frozen
class RowRound:
    """One round of one batch row."""

    draft: list[int]
    accepted: int
    own: int


def rows_of(trace: Traced, drafter: Recorded | None, batch: int) -> list[list[RowRound]]:
    """The rounds of each batch row, from the record of a run."""
    drafts = iter(drafter.drafts if drafter is not None else ())
    rows: list[list[RowRound]] = [[] for _ in range(batch)]
    for active, done in trace.rounds:
        draft = next(drafts) if any(done.drafted) else [[] for _ in range(batch)]
        for row, on in enumerate(active):
            if on:
                rows[row].append(RowRound(draft[row], done.accepted[row], done.ids[row][-1]))
    return rows


def expected_passes(model: Model, prompt: bytes, rounds: Sequence[RowRound]) -> Passes:
    """Verification passes that a verified sampler needs (drafts not counted), from true flags.

    An encoder + global pass is due where a flag that was not known before a round is set.
    """
    ids, known, total = [model.scheme.bos, *model.scheme.encode(prompt)], 0, Passes()
    for done in rounds:
        flags = true_flags(model, [*ids, *done.draft])
        length = len(ids) + done.accepted
        fresh = [i for i in range(known + 1, len(flags)) if flags[i]]
        total += Passes(decoder=1, encoder=int(bool(fresh)), scorer=1)
        if known:
            saw("closed by the bonus byte", flags[len(ids)])
            saw("closed only in the rejected part", fresh and fresh[0] > length)
        known = length
        ids = [*ids, *done.draft[: done.accepted], done.own]
    return total


def observe(
    index: int, requests: Sequence[Request], rows: list[list[RowRound]], done: Sequence[Progress]
) -> None:
    """Count the situations that a run went through."""
    model, shape = models.model(index), models.shape(index)
    saw(f"patcher {shape.patcher}")
    saw("decoder reads byte states", shape.reads_byte_states)
    saw("rows finish in different rounds", len({len(r) for r in rows}) > 1)
    saw("batch of unequal prompts", len({len(r.prompt) for r in requests}) > 1)
    for request, rounds, record in zip(requests, rows, done, strict=True):
        observe_prompt(request.prompt, shape.decoder_window)
        reason = {"length": "length", "eos": "EOS", "stop": "a stop string"}
        saw(f"ended by {reason[str(record.stop_reason)]}")
        saw("special id output", len(record.ids) > len(record.output))
        ids = [model.scheme.bos, *model.scheme.encode(request.prompt), *record.ids]
        sizes = [size for _, size in patches_of(true_flags(model, ids))[1:]]
        saw("patch of one byte", shape.patch != 1 and 1 in sizes)
        saw("patch of the maximum", shape.patch in sizes and len(set(sizes)) > 1)
        for turn in rounds:
            if not turn.draft:
                continue
            length, eos = len(turn.draft), model.scheme.eos
            saw(f"draft of {length}")
            saw("accepted none", turn.accepted == 0)
            saw("accepted some", 0 < turn.accepted < length)
            saw("accepted all", turn.accepted == length)
            saw("EOS inside a draft", eos in turn.draft[:-1])
            saw("EOS accepted", eos in turn.draft[: turn.accepted])
        last = rounds[-1]
        kept = model.scheme.decode(last.draft[: last.accepted])
        if record.stop_reason == "stop":
            saw(
                "stop string inside an accepted draft",
                any(bytes(record.output).endswith(s) and s in kept[:-1] for s in request.stop),
            )


def observe_prompt(prompt: bytes, window: int | None) -> None:
    """Count what kind of prompt this is."""
    saw("empty prompt", not prompt)
    saw("prompt of one byte", len(prompt) == 1)
    saw("prompt with NUL", 0 in prompt)
    saw("prompt longer than a window", window is not None and len(prompt) > window)
    try:
        prompt.decode()
    except UnicodeDecodeError:
        saw("prompt of invalid UTF-8")
