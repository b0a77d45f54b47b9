"""Measures single passes of a model: what each part takes for so many rows, and what the engine.

A probe stands in the sampler's place: each of its rounds runs one true pass over a given number of
rows, maybe after a draft pass or a denoising one, and goes on by one byte of a given text. Methods
of the model's parts are timed where they are called. No sampler is run.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import attrs
import torch

from blt_core.errors import RunError
from blt_core.model import Model
from blt_core.pipeline import Pipeline, Step
from blt_core.protocols import DecodeOps
from blt_core.types import Draws, IdScheme, Round, Sampling

#: Rows of the true passes that are measured.
WIDTHS = (1, 2, 3, 5, 9, 17, 33)
#: A patch of the probe's text.
PATCH_BYTES = 4
#: All kinds of rounds are run so often, and on for so many seconds, but at most so often.
LEAST_TURNS, SECONDS, MOST_TURNS = 1, 5.0, 16
#: Of a kind so many follow one another, as in samplers; the first, after another kind, is dropped.
REPEATS = 3
#: A prompt is read so often, as long as it takes no longer than SECONDS in all.
PROMPT_TURNS = 4


@attrs.frozen
class Turn:
    """One round of the probe: rows of its true pass; before it a draft pass, or a block's."""

    rows: int
    draft: bool = False
    block: int = 0


@attrs.frozen
class Sample:
    """One pass of a part: its rows, the positions before them, and what it took."""

    rows: int
    context: int
    seconds: float


class Clock:
    """Times of passes, by part, while a model's parts are watched."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.samples: dict[str, list[Sample]] = defaultdict(list)
        #: Seconds in parts since it was last set to 0.
        self.inside = 0.0
        self._embedding = 0.0

    def now(self) -> float:
        """The time, when all that was begun on the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def told(self) -> Iterator[tuple[str, Sample]]:
        """All samples, each with its part."""
        for part, samples in self.samples.items():
            for sample in samples:
                yield part, sample

    def timed(self, call: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        """``call``, which tells ``note`` its seconds and its arguments."""

        def watched(*arguments: Any, **keys: Any) -> Any:
            began = self.now()
            found = call(*arguments, **keys)
            seconds = self.now() - began
            self.inside += seconds
            note(seconds, *arguments)
            return found

        return watched

    def embedded(self, seconds: float, *_: Any) -> None:
        """The embedding of patches counts for the pass of the global model that follows."""
        self._embedding = seconds

    def closed(self, seconds: float, latents: Any, cache: Any) -> None:
        """A pass of the global model; its cache holds the new patches by then."""
        [count] = latents.counts
        self._note("global_model", count, cache.lengths[0] - count, seconds + self._embedding)

    def read(self, part: str) -> Callable[..., None]:
        """Passes over byte rows, with their cache."""

        def note(seconds: float, rows: Any, cache: Any) -> None:
            [count] = rows.lengths
            self._note(part, count, cache.lengths[0] - count, seconds)

        return note

    def decoded(self, seconds: float, clean: Any, blocks: Any, _latents: Any, cache: Any) -> None:
        """A pass of the decoder."""
        count = 0 if clean is None else clean.lengths[0]
        before = cache.rows.lengths[0] - count
        if blocks is None:
            self._note("decoder", count, before, seconds)
        else:
            self._note("blocks", count + blocks.ids_bnB.shape[2], before, seconds)

    def _note(self, part: str, rows: int, context: int, seconds: float) -> None:
        self.samples[part].append(Sample(rows, context, seconds))


@contextlib.contextmanager
def watching(model: Model, clock: Clock, probe: Probe) -> Iterator[None]:
    """Within the block the parts of a model are timed, and patches are the probe's."""
    read, watched = clock.timed, list[tuple[object, str, Callable[..., Any]]]()
    watched.append(
        (model.patcher, "flags", probe.flags(read(model.patcher.flags, clock.read("scorer"))))
    )
    encoder, latents, decoder = model.encoder, model.global_model, model.decoder
    watched.append((encoder, "byte_states", read(encoder.byte_states, clock.read("encoder"))))
    watched.append((encoder, "patch_embeddings", read(encoder.patch_embeddings, clock.embedded)))
    watched.append((latents, "forward", read(latents.forward, clock.closed)))
    watched.append((decoder, "forward", read(decoder.forward, clock.decoded)))
    try:
        for part, name, call in watched:
            vars(part)[name] = call
        yield
    finally:
        for part, name, _ in watched:
            vars(part).pop(name, None)


class Probe:
    """A sampler that runs what its turns say, and writes a text that is given."""

    def __init__(self, scheme: IdScheme, text: bytes, turns: Iterator[Turn], clock: Clock) -> None:
        self._text = [scheme.bos, *scheme.encode(text)]
        self._turns, self._clock = turns, clock
        self._length = 0
        self.turn = Turn(0)
        #: Seconds of the engine in the last draft pass, and in all of the turn before its true one.
        self.draft = self.before = 0.0

    def check(self, sampling: Sampling) -> None:
        """Serves all."""

    def flags(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The patcher's flags, in place of which patches of PATCH_BYTES are given."""

        def planned(rows: Any, cache: Any) -> Any:
            found = call(rows, cache)
            [count] = rows.lengths
            first = self._length - count + 1
            given = [(first + i) % PATCH_BYTES == 0 or first + i == 1 for i in range(count)]
            return torch.tensor([given], device=found.device)

        return planned

    def round(self, ops: DecodeOps, sampling: Sampling, draws: Draws) -> Round:
        """One turn."""
        fresh, begin = ops.fresh, ops.lengths
        at = begin[0]
        self.turn = Turn(1) if fresh else next(self._turns)
        began, self._clock.inside = self._clock.now(), 0.0
        if self.turn.draft:
            logits = ops.draft_logits([1])
            sampling.picks(logits, begin, [1], draws)
            ops.append([self._text[at : at + 1]])
            self.draft = self._clock.now() - began - self._clock.inside
            ops.rewind(begin)
        if self.turn.block:
            block = ops.open_block(self.turn.block, start="aligned")
            ops.denoise(block).softmax(-1).argmax(-1).tolist()
        self.before, self._clock.inside = self._clock.now() - began, 0.0
        rows = self.turn.rows
        if rows > 1:
            ops.append([self._text[at : at + rows - 1]])
        self._length = ops.lengths[0]
        sampling.picks(ops.next_logits([rows]), begin, [rows], draws)
        if rows > 1:
            ops.rewind(begin)
        own = self._text[at : at + 1]
        ops.append([own])
        return Round([list(own)], [0], [0], prefill=fresh)


@attrs.frozen
class Measured:
    """What a probe found: passes by part, the engine's share of rounds by rows, and of drafts.

    prompt: the passes that read the text before, by part.
    """

    passes: dict[str, list[Sample]]
    rounds: dict[int, list[float]]
    drafts: list[float]
    prompt: list[tuple[str, Sample]]


def run(
    pipeline: Pipeline,
    before: int,
    turns: Sequence[Turn],
    seconds: float,
    watch: Callable[[], None],
) -> Measured:
    """All turns in order, again and again, after a text of ``before`` bytes; not the first time."""
    clock = Clock(pipeline.model.device)
    again = [turn for turn in turns for _ in range(REPEATS)]
    room = min(MOST_TURNS, (pipeline.model.context_bytes - before - 64) // len(again) - 1)
    if room < 1:
        raise RunError(
            f"the model's context of {pipeline.model.context_bytes} bytes is too short to time "
            f"passes after {before} bytes\n  fix: raise context_bytes, for the measurement alone"
        )
    new = len(turns) + room * len(again) + 1
    with _steps(pipeline, before, chain(turns, cycle(again)), new, clock) as (probe, steps):
        next(steps)
        found = Measured(defaultdict(list), defaultdict(list), [], list(clock.told()))
        for _ in turns:  # warming up
            next(steps)
        started = time.perf_counter()
        for number in range(room):
            if number >= LEAST_TURNS and time.perf_counter() - started > seconds:
                break
            for index in range(len(again)):
                clock.samples.clear()
                began = clock.now()
                next(steps)
                whole = clock.now() - began
                watch()
                if not index % REPEATS:
                    continue
                for part, samples in clock.samples.items():
                    found.passes[part] += samples
                if probe.turn.draft:
                    found.drafts.append(probe.draft)
                elif not probe.turn.block:
                    found.rounds[probe.turn.rows].append(whole - probe.before - clock.inside)
    return found


def prompt_passes(
    pipeline: Pipeline, size: int, times: int, watch: Callable[[], None]
) -> Iterator[tuple[str, Sample]]:
    """The first pass over a text of ``size`` bytes, by part; so often, unless it is long."""
    clock, began = Clock(pipeline.model.device), time.perf_counter()
    for _ in range(times):
        with _steps(pipeline, size, iter(()), 1, clock) as (_, steps):
            next(steps)
        watch()
        if time.perf_counter() - began > SECONDS:
            break
    yield from clock.told()


@contextlib.contextmanager
def _steps(
    pipeline: Pipeline, before: int, turns: Iterator[Turn], new: int, clock: Clock
) -> Iterator[tuple[Probe, Iterator[Step]]]:
    """A probe at work on a text of ``before`` bytes, with the model's parts watched."""
    text = sample_text(before + new + max(WIDTHS))
    probe = Probe(pipeline.model.scheme, text, turns, clock)
    alone = Pipeline(pipeline.plan, pipeline.plugins, pipeline.model)
    alone.sampler = probe
    with watching(pipeline.model, clock, probe):
        yield probe, alone.steps(text[:before], max_new_bytes=new, temperature=0.0)


def sample_text(size: int) -> bytes:
    """Python source of so many bytes."""
    source = Path(argparse.__file__).read_bytes()
    return (source * -(-size // len(source)))[:size]
