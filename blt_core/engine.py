"""The decode loop: sampler rounds, end rules, streaming and what is reported of a run.

Axes: b batch rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal

import attrs

from blt_core.errors import EngineError, RequestError
from blt_core.faults import naming
from blt_core.model import Model
from blt_core.protocols import Sampler
from blt_core.state import DecodeState
from blt_core.types import Draws, IdScheme, Passes, Round, Sampling

StopReason = Literal["length", "eos", "stop"]


@attrs.frozen
class Request:
    """One text to continue.

    prompt: any bytes, also none. max_new_bytes: at least 1. stop: output ends with the first of
    these byte strings, which is kept. seed: of this request's own random draws.
    """

    prompt: bytes
    max_new_bytes: int = 256
    stop: tuple[bytes, ...] = ()
    seed: int = 0

    def check(self, model: Model, index: int) -> None:
        """Raise RequestError if this request, number ``index``, cannot be served."""
        if self.max_new_bytes < 1:
            raise RequestError(f"max_new_bytes: expected at least 1, got {self.max_new_bytes}")
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
class Progress:
    """What one batch row has output and caused so far.

    ids: those of the output, special ids that show as no byte included, EOS not. rounds counts
    sampler rounds, without one that only reads the prompt. accepted: drafted ids that verification
    let stand (also such that an EOS or stop string then cuts off), without the model's own.
    """

    request: Request
    output: bytearray = attrs.field(factory=bytearray)
    ids: list[int] = attrs.field(factory=list)
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    passes: Passes = attrs.field(factory=Passes)
    stop_reason: StopReason | None = None
    first_ids: int = 0
    prefill_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def bytes_per_second(self) -> float:
        """Output after the first round by the time after it (0 where there was none)."""
        later = len(self.ids) - self.first_ids
        return later / self.seconds if self.seconds > 0 else 0.0


@attrs.frozen
class Step:
    """What one round added: the new bytes of each batch row."""

    new: tuple[bytes, ...]
    progress: tuple[Progress, ...]


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


def _rounds(
    model: Model, sampler: Sampler, requests: Sequence[Request], sampling: Sampling
) -> Iterator[Step]:
    state = DecodeState(
        model,
        [model.scheme.encode(request.prompt) for request in requests],
        [request.max_new_bytes for request in requests],
    )
    draws = Draws(tuple(request.seed for request in requests))
    progress = tuple(Progress(request) for request in requests)
    first = True
    while any(state.remaining):
        lengths, began = state.lengths, time.perf_counter()
        with naming(sampler):
            done = sampler.round(state, sampling, draws)
            elapsed = time.perf_counter() - began
            check_round(state, lengths, done, first=first)
        new = _account(state, progress, done, elapsed, first=first)
        state.settle()
        first = False
        yield Step(new, progress)


def check_round(
    state: DecodeState, lengths: Sequence[int], done: Round, *, first: bool = True
) -> None:
    """Raise EngineError unless ``done`` says what a sampler did to texts of these ``lengths``.

    Every unfinished row gets at least one id, all of them such as may be output: those added. No
    row has more ids accepted than drafted. Only the first round reads the prompt.
    """
    scheme, batch = state.scheme, len(lengths)
    never = set(scheme.never_output)
    if not isinstance(done, Round) or not (
        len(done.ids) == len(done.drafted) == len(done.accepted) == batch
    ):
        raise EngineError(f"the sampler's round is not a Round of {batch} batch rows: {done!r}")
    _check_counts(done, first=first)
    for row, (left, length) in enumerate(zip(state.remaining, lengths, strict=True)):
        added = state.text(row, length)
        if not left:
            continue
        if not added:
            raise EngineError(f"the sampler committed nothing to batch row {row}")
        if list(done.ids[row]) != added:
            raise EngineError(
                f"the sampler says that it committed {list(done.ids[row])} to batch row {row}, "
                f"but the text has {added}"
            )
        for token in added:
            if token in never or not 0 <= token < scheme.size:
                raise EngineError(
                    f"the sampler committed id {token} to batch row {row}, which is never output"
                )


def _check_counts(done: Round, *, first: bool) -> None:
    if not isinstance(done.prefill, bool) or (done.prefill and not first):
        raise EngineError(f"prefill = {done.prefill!r}: only a first round reads the prompt")
    for row, counts in enumerate(zip(done.accepted, done.drafted, strict=True)):
        if not (all(type(n) is int for n in counts) and 0 <= counts[0] <= counts[1]):
            raise EngineError(
                f"the sampler says that {counts[0]!r} of {counts[1]!r} drafted ids were accepted "
                f"in batch row {row}; expected integers, 0 <= accepted <= drafted"
            )


def _account(
    state: DecodeState, progress: Sequence[Progress], done: Round, elapsed: float, *, first: bool
) -> tuple[bytes, ...]:
    """Apply the end rules to what a round committed, and add it to the rows' records."""
    new = []
    for row, (record, left) in enumerate(zip(progress, state.remaining, strict=True)):
        if not left:
            new.append(b"")
            continue
        ids, record.stop_reason = end(record, done.ids[row], state)
        state.spend(row, left if record.stop_reason else len(ids))
        added = state.scheme.decode(ids)
        record.output += added
        record.ids += ids
        record.passes = state.passes(row)
        record.rounds += not done.prefill
        record.drafted += done.drafted[row]
        record.accepted += done.accepted[row]
        if first:
            record.prefill_seconds, record.first_ids = elapsed, len(ids)
        else:
            record.seconds += elapsed
        new.append(added)
    return tuple(new)


def end(
    record: Progress, ids: Sequence[int], state: DecodeState
) -> tuple[list[int], StopReason | None]:
    """Those of ``ids`` that count, and why the output ends with them, if it does.

    What follows the first EOS or stop string is dropped; EOS itself is none of the output.
    """
    scheme = state.scheme
    reason: StopReason | None = None
    ids = list(ids)
    if scheme.eos in ids:
        ids, reason = ids[: ids.index(scheme.eos)], "eos"
    room = record.request.max_new_bytes - len(record.ids)
    if len(ids) >= room:  # also where EOS follows: one byte at a time, none would be read there
        ids, reason = ids[:room], "length"
    text = bytes(record.output) + scheme.decode(ids)
    ends = [at + len(s) for s in record.request.stop if (at := text.find(s)) >= 0]
    if ends:
        ids, reason = _reaching(scheme, ids, min(ends) - len(record.output)), "stop"
    return ids, reason


def _reaching(scheme: IdScheme, ids: Sequence[int], count: int) -> list[int]:
    """The shortest beginning of ``ids`` that shows as ``count`` bytes."""
    shown = list(accumulate(map(scheme.is_byte, ids), initial=0))
    return list(ids[: shown.index(count)])
