"""The decode loop: sampler rounds, end rules, streaming and what is reported of a run.

Axes: b batch rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal

import attrs

from blt_core.decoding.state import DecodeState
from blt_core.errors import EngineError, RequestError
from blt_core.faults import naming
from blt_core.likelihood import Likelihood, likelihoods
from blt_core.model import Model
from blt_core.protocols import Sampler
from blt_core.types import Draws, IdScheme, Passes, Round, RoundCounts, Sampling

StopReason = Literal["length", "eos", "stop"]

_COMMITS, _COUNTS, _KEEPS = "sampler.commits", "sampler.counts", "sampler.keeps-text"


@attrs.frozen
class Request:
    """One text to continue.

    prompt: any bytes, also none. max_new_bytes: at least 1. stop: output ends with the first of
    these byte strings, which is kept; they are looked for in the output alone, so one that begins
    in the prompt is none. seed: of this request's own random draws. logprobs: None, or how many of
    the likeliest ids to tell of each place, beside the log-probability of the id itself.
    """

    prompt: bytes
    max_new_bytes: int = 256
    stop: tuple[bytes, ...] = ()
    seed: int = 0
    logprobs: int | None = None

    def check(self, model: Model, index: int) -> None:
        """Raise RequestError if this request, number ``index``, cannot be served."""
        if self.max_new_bytes < 1:
            raise RequestError(f"max_new_bytes: expected at least 1, got {self.max_new_bytes}")
        if self.logprobs is not None and self.logprobs < 0:
            raise RequestError(f"logprobs: expected 0 or more, got {self.logprobs}")
        if any(not stop for stop in self.stop):
            raise RequestError("stop: a stop string must not be empty")
        room = model.context_bytes - len(self.prompt)
        if self.max_new_bytes > room:
            lower = f" or lower max_new_bytes to {room}" if room > 0 else ""
            raise RequestError(
                f"prompt {index + 1}: {len(self.prompt)} bytes + {self.max_new_bytes} new bytes "
                f"exceed the model's context of {model.context_bytes} bytes. "
                f"Shorten the prompt{lower}"
            )


@attrs.define
class Text:
    """A growing output: its ids, and the bytes that they show as. Only the engine adds to it.

    likelihoods: of its ids, and of an EOS after them, where the request asks for them.
    """

    ids: list[int] = attrs.field(factory=list)
    shown: bytearray = attrs.field(factory=bytearray)
    likelihoods: list[Likelihood] = attrs.field(factory=list)


@attrs.frozen(eq=False)
class Progress:
    """What one batch row had output and caused after some round; later rounds do not change it.

    length: ids of the output; shown: the bytes that they show as. rounds counts sampler rounds,
    without one that only reads the prompt. drafted: all ids that were drafted; accepted: those of
    them that are in the output, so none that an EOS, a stop string or the length cut off, and none
    of the model's own. counts: the rounds by how much they drafted and accepted.
    """

    request: Request
    length: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    counts: RoundCounts = attrs.field(factory=RoundCounts)
    passes: Passes = attrs.field(factory=Passes)
    stop_reason: StopReason | None = None
    first_ids: int = 0
    prefill_seconds: float = 0.0
    seconds: float = 0.0
    # All progress of a row shares one text and sees its own beginning of it: no round copies.
    text: Text = attrs.field(factory=Text, repr=False)
    shown: int = attrs.field(default=0, repr=False)

    @property
    def output(self) -> bytes:
        """The new bytes so far."""
        return bytes(self.text.shown[: self.shown])

    @property
    def ids(self) -> tuple[int, ...]:
        """The new ids so far: also special ids, which show as no byte, but never EOS."""
        return tuple(self.text.ids[: self.length])

    @property
    def likelihoods(self) -> tuple[Likelihood, ...] | None:
        """How likely each of ``ids`` was; None unless the request asks for it."""
        if self.request.logprobs is None:
            return None
        return tuple(self.text.likelihoods[: self.length])

    @property
    def eos(self) -> Likelihood | None:
        """How likely the EOS was that ended the output, if one did and the request asks for it."""
        told = self.stop_reason == "eos" and len(self.text.likelihoods) > self.length
        return self.text.likelihoods[self.length] if told else None

    @property
    def bytes_per_second(self) -> float:
        """Output after the first round by the time after it (0 where there was none)."""
        later = self.length - self.first_ids
        return later / self.seconds if self.seconds > 0 else 0.0

    def tail(self, count: int) -> bytes:
        """The last ``count`` bytes of the output, or all if it has fewer."""
        return bytes(self.text.shown[max(self.shown - count, 0) : self.shown])


@attrs.frozen(eq=False)
class Step:
    """One round of a batch, as it was: what is held of a step stays as it is while others follow.

    new: the bytes that it added to each row's output. round: what the sampler did, before the end
    rules cut it. progress: each row's totals after it. calls: the passes run so far for the whole
    batch, each counted once.
    """

    new: tuple[bytes, ...]
    round: Round
    progress: tuple[Progress, ...]
    calls: Passes = attrs.field(factory=Passes)


def decode(
    model: Model, sampler: Sampler, requests: Sequence[Request], sampling: Sampling
) -> Iterator[Step]:
    """Run rounds until every request has ended; requests are checked before any work.

    Raises RequestError for requests that cannot be served, EngineError for a sampler that breaks
    its contract.
    """
    check_requests(model, sampler, requests, sampling)
    return _rounds(model, sampler, requests, sampling)


def check_requests(
    model: Model, sampler: Sampler, requests: Sequence[Request], sampling: Sampling
) -> None:
    """Raise RequestError if a batch could not be served; computes nothing."""
    if not requests:
        raise RequestError("no prompts were given")
    for index, request in enumerate(requests):
        request.check(model, index)
    with naming():
        sampler.check(sampling)
    told = any(request.logprobs is not None for request in requests)
    if told and not getattr(sampler, "true_logits", False):
        raise RequestError(
            "logprobs: this sampler outputs bytes that no full pass of the model predicts\n"
            "  fix: use ar or a verified sampler, or score the output afterwards"
        )


def _rounds(
    model: Model, sampler: Sampler, requests: Sequence[Request], sampling: Sampling
) -> Iterator[Step]:
    state = DecodeState(
        model,
        [model.scheme.encode(request.prompt) for request in requests],
        [request.max_new_bytes for request in requests],
        keeps_predictions=any(request.logprobs is not None for request in requests),
    )
    draws = Draws(tuple(request.seed for request in requests))
    progress = tuple(Progress(request) for request in requests)
    first = True
    while any(state.remaining):
        lengths, began = state.lengths, time.perf_counter()
        state.commit()
        with naming(sampler):
            done = sampler.round(state, sampling, draws)
            elapsed = time.perf_counter() - began
            check_round(state, lengths, done, first=first)
        new, progress = _account(state, progress, done, elapsed, first=first)
        state.settle()
        first = False
        yield Step(new, done, progress, state.calls)


def check_round(
    state: DecodeState, lengths: Sequence[int], done: Round, *, first: bool = True
) -> None:
    """Raise EngineError unless ``done`` says what a sampler did to texts of these ``lengths``.

    Every unfinished row gets at least one id, all of them such as may be output: those added. No
    row has more ids accepted than drafted. Only the first round reads the prompt.
    """
    scheme, batch = state.scheme, len(lengths)
    never = scheme.never_output
    if not _is_round(done, batch):
        text = f"the sampler's round is not a Round of {batch} batch rows: {done!r}"
        raise EngineError(text, contract=_COUNTS)
    _check_counts(done, first=first)
    for row, (left, length) in enumerate(zip(state.remaining, lengths, strict=True)):
        if state.rewritten(row):
            text = f"the sampler changed bytes of batch row {row} that were output already"
            raise EngineError(text, contract=_KEEPS)
        added = state.text(row, length)
        if not left:
            continue
        if not added:
            text = f"the sampler committed nothing to batch row {row}"
            raise EngineError(text, contract=_COMMITS)
        if list(done.ids[row]) != added:
            raise EngineError(
                f"the sampler says that it committed {list(done.ids[row])} to batch row {row}, "
                f"but the text has {added}",
                contract=_COMMITS,
            )
        drafted, accepted = done.drafted[row], done.accepted[row]
        if not 0 <= accepted <= min(drafted, len(added)):
            raise EngineError(
                f"the sampler says that it accepted {accepted} of {drafted} drafted ids in batch "
                f"row {row}, and committed {len(added)}",
                contract=_COUNTS,
            )
        for token in added:
            if token in never or not 0 <= token < scheme.size:
                raise EngineError(
                    f"the sampler committed id {token} to batch row {row}, which is never output",
                    contract=_COMMITS,
                )


def _is_round(done: object, batch: int) -> bool:
    """Whether ``done`` is a Round of so many rows, whatever these hold."""
    if not isinstance(done, Round):
        return False
    columns: tuple[object, ...] = (done.ids, done.drafted, done.accepted)
    whole = all(isinstance(each, Sequence) and len(each) == batch for each in columns)
    return whole and all(isinstance(row, Sequence) for row in done.ids)


def _check_counts(done: Round, *, first: bool) -> None:
    if not isinstance(done.prefill, bool) or (done.prefill and not first):
        text = f"prefill = {done.prefill!r}: only a first round reads the prompt"
        raise EngineError(text, contract=_COUNTS)
    for row, counts in enumerate(zip(done.accepted, done.drafted, strict=True)):
        if not (all(type(n) is int for n in counts) and 0 <= counts[0] <= counts[1]):
            raise EngineError(
                f"the sampler says that {counts[0]!r} of {counts[1]!r} drafted ids were accepted "
                f"in batch row {row}; expected integers, 0 <= accepted <= drafted",
                contract=_COUNTS,
            )


def _account(
    state: DecodeState, progress: Sequence[Progress], done: Round, elapsed: float, *, first: bool
) -> tuple[tuple[bytes, ...], tuple[Progress, ...]]:
    """Apply the end rules to what a round committed: the rows' new bytes, and their progress."""
    scheme, new, after = state.scheme, [], []
    for row, (before, left) in enumerate(zip(progress, state.remaining, strict=True)):
        if not left:
            new.append(b"")
            after.append(before)
            continue
        ids, reason = end(before, done.ids[row], scheme)
        if before.request.logprobs is not None:
            shown = [*ids, scheme.eos] if reason == "eos" else ids
            before.text.likelihoods += _likelihoods(state, row, shown, done, before.request)
        state.spend(row, left if reason else len(ids))
        new.append(scheme.decode(ids))
        before.text.ids += ids
        before.text.shown += new[-1]
        # Accepted ids come first: what is cut off is the model's own before it is theirs.
        accepted, counted = min(done.accepted[row], len(ids)), not done.prefill
        here = RoundCounts.of(done.drafted[row], accepted, len(ids))
        after.append(
            attrs.evolve(
                before,
                length=before.length + len(ids),
                shown=before.shown + len(new[-1]),
                rounds=before.rounds + counted,
                drafted=before.drafted + done.drafted[row],
                accepted=before.accepted + accepted,
                counts=before.counts + here if counted else before.counts,
                passes=state.passes(row),
                stop_reason=reason,
                first_ids=len(ids) if first else before.first_ids,
                prefill_seconds=elapsed if first else before.prefill_seconds,
                seconds=0.0 if first else before.seconds + elapsed,
            )
        )
    return tuple(new), tuple(after)


def _likelihoods(
    state: DecodeState, row: int, ids: Sequence[int], done: Round, request: Request
) -> list[Likelihood]:
    """Those of the ids with which a round begins; EngineError if its last pass did not predict."""
    begin = state.lengths[row] - len(done.ids[row])
    logits = state.predictions(row, begin, len(ids))
    if logits is None:
        raise EngineError(
            "the sampler says true_logits, and committed ids that its last next_logits did not "
            f"predict, in batch row {row}",
            contract="sampler.true-logits",
        )
    return list(likelihoods(logits, ids, request.logprobs or 0))


def end(
    record: Progress, ids: Sequence[int], scheme: IdScheme
) -> tuple[list[int], StopReason | None]:
    """Those of ``ids`` that count, and why the output ends with them, if it does.

    What follows the first EOS or stop string is dropped; EOS itself is none of the output.
    """
    reason: StopReason | None = None
    ids = list(ids)
    if scheme.eos in ids:
        ids, reason = ids[: ids.index(scheme.eos)], "eos"
    room = record.request.max_new_bytes - record.length
    if len(ids) >= room:  # also where EOS follows: one byte at a time, none would be read there
        ids, reason = ids[:room], "length"
    if record.request.stop:
        shown = _stop(record, scheme.decode(ids))
        if shown is not None:
            ids, reason = _reaching(scheme, ids, shown), "stop"
    return ids, reason


def _stop(record: Progress, new: bytes) -> int | None:
    """How many of the ``new`` bytes the first stop string that ends among them reaches, if any."""
    stops = record.request.stop
    # No stop string ended before, so one that ends now begins in this tail at the earliest.
    tail = record.tail(max(map(len, stops)) - 1)
    text = tail + new
    ends = [at + len(s) for s in stops if (at := text.find(s)) >= 0]
    return min(ends) - len(tail) if ends else None


def _reaching(scheme: IdScheme, ids: Sequence[int], count: int) -> list[int]:
    """The shortest beginning of ``ids`` that shows as ``count`` bytes."""
    shown = list(accumulate(map(scheme.is_byte, ids), initial=0))
    return list(ids[: shown.index(count)])
