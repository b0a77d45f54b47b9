"""Random programs of operations, each result held to the plain reference and each pass to the spec.

The spec is written here anew, from the definition of the operations: a text, how many of its flags
are known, and how far true rows and latents reach. Private fields of the state are never read;
what is computed is seen by spies around the model's parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import attrs
import pytest
import torch

from blt_core.decoding.state import DecodeState
from blt_core.errors import EngineError
from blt_core.model import Model
from blt_core.testing.reference import block_logits, patches_of, row_logits, true_flags
from blt_core.types import Draws, Passes, Sampling
from tests.engine.runs import counts, observe_prompt
from tests.engine.seen import saw

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}


def same_logits(model: Model, got: torch.Tensor, want: torch.Tensor) -> None:
    """Fail unless the engine's logits equal the reference's, banned ids at -inf."""
    banned = torch.tensor(model.scheme.never_output)
    want = want.index_fill(-1, banned, float("-inf"))
    alike = (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    if not (alike and torch.allclose(got, want, **TOLERANCE)):  # quick; the other tells of it
        torch.testing.assert_close(got, want, **TOLERANCE)


@attrs.define
class Log:
    """What the spies saw since the last ``clear``: calls, and decoder rows and patches computed.

    total: all passes since the beginning.
    """

    scorer: int = 0
    byte_states: int = 0
    patches: list[tuple[int, ...]] = attrs.field(factory=list)
    latents: list[tuple[tuple[int, int], ...]] = attrs.field(factory=list)
    rows: list[tuple[tuple[int, int], ...]] = attrs.field(factory=list)
    decoder: int = 0
    total: Passes = attrs.field(factory=Passes)

    def tell_each(self, alike: Sequence[object]) -> None:
        """Give each batch row what was computed for it, where those of ``alike`` were one row."""
        distinct = [each for i, each in enumerate(alike) if each not in alike[:i]]
        saw("rows read once for several", len(distinct) < len(alike))
        for seen in (self.rows, self.latents):
            for i, ran in enumerate(seen):
                assert len(ran) == len(distinct)
                seen[i] = tuple(ran[distinct.index(each)] for each in alike)

    def clear(self) -> None:
        """Forget what was seen."""
        self.scorer = self.byte_states = self.decoder = 0
        self.patches, self.latents, self.rows = [], [], []


@attrs.frozen
class SpyPatcher:
    """Counts passes over new bytes."""

    inner: object
    log: Log

    def new_cache(self, batch):
        """The patcher's own."""
        return self.inner.new_cache(batch)

    def flags(self, rows, cache):
        """The patcher's own."""
        self.log.scorer += 1
        self.log.total += Passes(scorer=1)
        return self.inner.flags(rows, cache)


@attrs.frozen
class SpyEncoder:
    """Counts passes of the byte part and of the patch part."""

    inner: object
    log: Log

    def new_cache(self, batch):
        """The encoder's own."""
        return self.inner.new_cache(batch)

    def byte_states(self, rows, cache):
        """The encoder's own."""
        self.log.byte_states += 1
        self.log.total += Passes(encoder_bytes=1)
        return self.inner.byte_states(rows, cache)

    def patch_embeddings(self, states, patches):
        """The encoder's own."""
        self.log.patches.append(patches.counts)
        self.log.total += Passes(encoder=1)
        return self.inner.patch_embeddings(states, patches)


@attrs.frozen
class SpyGlobal:
    """Keeps which patches of each batch row were computed: (first, end)."""

    inner: object
    log: Log

    def new_cache(self, batch):
        """The global model's own."""
        return self.inner.new_cache(batch)

    def forward(self, embeddings, cache):
        """The global model's own."""
        before = tuple(cache.lengths)
        out = self.inner.forward(embeddings, cache)
        counts = zip(before, embeddings.counts, strict=True)
        self.log.latents.append(tuple((n, n + count) for n, count in counts))
        return out


@attrs.frozen
class SpyDecoder:
    """Keeps which clean rows of each batch row were computed: (first, end)."""

    inner: object
    log: Log
    denoises: bool
    reads_byte_states: bool

    def new_cache(self, batch):
        """The decoder's own."""
        return self.inner.new_cache(batch)

    def forward(self, clean, blocks, latents, cache):
        """The decoder's own."""
        self.log.decoder += 1
        self.log.total += Passes(decoder=1)
        if clean is not None:
            begun = zip(cache.rows.lengths, clean.lengths, strict=True)
            self.log.rows.append(tuple((n, n + count) for n, count in begun))
        return self.inner.forward(clean, blocks, latents, cache)


def watched(model: Model) -> tuple[Model, Log]:
    """``model`` with spies around its parts, and what they will see."""
    log = Log()
    decoder = model.decoder
    return (
        attrs.evolve(
            model,
            patcher=SpyPatcher(model.patcher, log),
            encoder=SpyEncoder(model.encoder, log),
            global_model=SpyGlobal(model.global_model, log),
            decoder=SpyDecoder(decoder, log, decoder.denoises, decoder.reads_byte_states),
        ),
        log,
    )


@attrs.define
class Follower:
    """An attached cache: remembers the ids of the rows it was shown."""

    ids: list[list[int]]
    settled: list[int]

    @property
    def lengths(self):
        """Rows remembered."""
        return [len(row) for row in self.ids]

    def rewind(self, lengths):
        """Forget the rows after ``lengths``."""
        for row, length, settled in zip(self.ids, lengths, self.settled, strict=True):
            assert length >= settled, "rewound below what was settled"
            del row[length:]

    def settle(self, lengths):
        """Note what will stay."""
        for row, (ids, length) in enumerate(zip(self.ids, lengths, strict=True)):
            assert length <= len(ids), "settled more than is remembered"
            self.settled[row] = max(self.settled[row], length)


@attrs.define
class RowSpec:
    """One batch row by the definition of the operations.

    known: flags 0..known are known. true: clean rows [0, true) are computed and true. latents:
    closed patches whose latents are computed. settled: as the engine promised. prompt: its ids, BOS
    included.
    """

    ids: list[int]
    known: int = 0
    true: int = 0
    latents: int = 0
    settled: int = 0
    prompt: int = 0
    idle: int = 0
    decoder: int = 0
    encoder: int = 0
    scorer: int = 0


class Machine:
    """Runs a program on a state and on the spec side by side."""

    def __init__(self, model: Model, prompts: Sequence[bytes], window: int | None) -> None:
        self.model = model
        watched_model, self.log = watched(model)
        encoded = [model.scheme.encode(prompt) for prompt in prompts]
        self.state = DecodeState(watched_model, encoded, [100] * len(prompts))
        self.rows = [RowSpec([model.scheme.bos, *ids], prompt=1 + len(ids)) for ids in encoded]
        self.fresh = True
        self.computed = False
        self._flags: dict[tuple[int, ...], list[bool]] = {}
        for prompt in prompts:
            observe_prompt(prompt, window)

    # -- what the reference says -------------------------------------------------------------

    def true_flags(self, row: RowSpec) -> list[bool]:
        """The patcher's own flags 0..n, computed once for each text."""
        text = tuple(row.ids)
        if text not in self._flags:
            self._flags[text] = true_flags(self.model, text)
        return self._flags[text]

    def flags(self, row: RowSpec) -> list[bool]:
        """Flags 0..n with the unknown ones cleared."""
        flags = self.true_flags(row)
        return flags[: row.known + 1] + [False] * (len(row.ids) - row.known)

    def agree(self, got: torch.Tensor, want: torch.Tensor) -> None:
        """Equal but for the ids that are never output."""
        same_logits(self.model, got, want)

    def settle_check(self) -> None:
        """After each operation: texts, known flags and counted passes are those of the spec."""
        for b, row in enumerate(self.rows):
            assert self.state.text(b) == row.ids
            assert self.state.flags(b) == self.flags(row)[: row.known + 1]
            passes = self.state.passes(b)
            counted = (passes.decoder, passes.encoder, passes.scorer)
            assert counted == (row.decoder, row.encoder, row.scorer)
        calls = self.state.calls
        assert counts(calls) == self.log.total
        shapes = calls.shapes
        assert shapes.decoder.passes + shapes.blocks.passes == calls.decoder
        assert shapes.encoder.passes == calls.encoder_bytes
        assert shapes.global_model.passes == calls.encoder
        assert shapes.scorer.passes == calls.scorer
        follower = self.state.attach(self, self._follower)
        for row, ids in zip(self.rows, follower.ids, strict=True):
            assert row.ids[: len(ids)] == ids

    @staticmethod
    def _follower(batch: int) -> Follower:
        return Follower([[] for _ in range(batch)], [0] * batch)

    # -- operations --------------------------------------------------------------------------

    def run(self, program: Sequence[tuple[str, int]]) -> None:
        """All operations of a program; ``number`` decides the details of each."""
        for name, number in program:
            self.log.clear()
            getattr(self, name)(Random(number))
            self.settle_check()

    def append(self, rng: Random) -> None:
        """Zero to four bytes for each row."""
        new = [
            [rng.choice((32, 0, 97, rng.randrange(256))) for _ in range(rng.randrange(5))]
            for _ in self.rows
        ]
        self.state.append(new)
        for row, ids in zip(self.rows, new, strict=True):
            row.ids += ids
        self._nothing_ran()

    def rewind(self, rng: Random) -> None:
        """To any length above what is settled, and not into a prompt that is read."""
        lengths = []
        for row in self.rows:
            n = len(row.ids)
            read = row.scorer or row.decoder
            low = max(row.settled + 1, row.prompt if read else 0, n - rng.choice((1, 4, 9)))
            length = rng.randint(low, n) if rng.randrange(4) else n
            if length < n and length <= row.known:
                boundary = self.flags(row)[length]
                saw("rewind to a boundary", boundary)
                saw("rewind inside a patch", not boundary)
            lengths.append(length)
        self.state.rewind(lengths)
        for row, length in zip(self.rows, lengths, strict=True):
            del row.ids[length:]
            row.prompt = min(row.prompt, length)
            row.known = min(row.known, length)
            row.true = min(row.true, length)
            row.latents = min(row.latents, len(patches_of(self.flags(row))))
        self._nothing_ran()

    def settle(self, rng: Random) -> None:
        """Rewinding into patches that ended is over."""
        self.state.settle()
        for row in self.rows:
            row.settled = max(row.settled, self._open_start(row))
        self._nothing_ran()

    def attach(self, rng: Random) -> None:
        """Show the attached cache all of each text."""
        follower = self.state.attach(self, self._follower)
        for ids, row in zip(follower.ids, self.rows, strict=True):
            ids[:] = row.ids

    def next(self, rng: Random) -> None:
        """A true pass: everything pending, each true row and closed patch once."""
        asked = self._asked(rng)
        got = self.state.next_logits(asked)
        self._tell_each(asked)
        pending = False
        for b, (row, rows) in enumerate(zip(self.rows, asked, strict=True)):
            n = len(row.ids)
            if not rows:
                self._idle(b)
                continue
            saw("rows asked for again", n - rows < row.true)
            saw("row idle for several passes", row.idle > 2)
            row.idle = 0
            flags = self.true_flags(row)
            self.agree(got[b, :rows], row_logits(self.model, row.ids, flags)[n - rows :])
            assert self.log.rows[0][b] == (min(row.true, n - rows), n)
            pending |= row.known < n
            row.scorer += row.known < n
            row.known = row.true = n
            row.encoder += self._closed(b, len(patches_of(flags)))
            row.decoder += 1
        assert (self.log.scorer, self.log.decoder) == (int(pending), 1)
        self._prompts_settle()

    def draft(self, rng: Random) -> None:
        """The decoder alone: what is unknown reads the newest latent."""
        asked = self._asked(rng)
        if self._refused(lambda: self.state.draft_logits(asked), asked):
            return
        got = self.state.draft_logits(asked)
        for b, (row, rows) in enumerate(zip(self.rows, asked, strict=True)):
            n = len(row.ids)
            if not rows:
                self._idle(b)
                continue
            flags = self.flags(row)
            self.agree(got[b, :rows], row_logits(self.model, row.ids, flags)[n - rows :])
            first, end = self.log.rows[0][b]
            assert end == n
            assert first >= min(row.true, n - rows)
            row.true = max(row.true, min(row.known, n))
            row.decoder += 1
        self._decoder_alone()

    def write(self, rng: Random) -> None:
        """The decoder alone writes up to five likeliest ids for each row, or up to an EOS."""
        limits = [rng.randint(1, 5) if on else 0 for on in self._active(rng)]
        asked = (limits, Sampling(), Draws((0,) * len(limits)))
        if self._refused(lambda: self.state.draft(*asked), limits):
            return
        written = self.state.draft(*asked)
        for b, (row, new, most) in enumerate(zip(self.rows, written, limits, strict=True)):
            if not most:
                self._idle(b)
                assert new == []
                continue
            n, count = len(row.ids), len(new)
            assert count == most or new[-1] == self.model.scheme.eos
            assert self.model.scheme.eos not in new[:-1]
            row.ids += new
            want = row_logits(self.model, row.ids, self.flags(row))[n - 1 : -1]
            want = want.index_fill(-1, torch.tensor(self.model.scheme.never_output), float("-inf"))
            chosen = want[torch.arange(count), torch.tensor(new)]
            torch.testing.assert_close(chosen, want.amax(-1), **TOLERANCE)
            first, end = self.log.rows[0][b]
            assert end == n
            assert first >= min(row.true, n - 1)
            later = [(n + i, n + i + 1) for i in range(count - 1)]
            at_end = [(n + count - 1,) * 2] * (len(self.log.rows) - count)
            assert [ran[b] for ran in self.log.rows[1:]] == [*later, *at_end]
            row.true = max(row.true, min(row.known, n))
            row.decoder += count
        self._decoder_alone(max(map(len, written)))

    def block(self, rng: Random) -> None:
        """A block, denoised up to three times with changing content."""
        if not self.model.decoder.denoises:
            return
        start, closure = rng.choice(
            (("aligned", "none"), ("frontier", "forced"), ("frontier", "none"))
        )
        size = rng.randint(1, 9)
        active = self._active(rng)
        forced = closure == "forced"
        scored = forced and rng.randrange(2) > 0
        block = self.state.open_block(
            size, start=start, closure=closure, scored=scored, active=active
        )
        self._nothing_ran()
        if not scored and self._refused(lambda: self.state.denoise(block), active):
            return
        starts = [self._block_start(row, size, start) for row in self.rows]
        assert [s for s, on in zip(starts, active, strict=True) if on] == [
            s for s, on in zip(block.start, active, strict=True) if on
        ]
        fell_back = [
            s == len(r.ids) for s, r, on in zip(starts, self.rows, active, strict=True) if on
        ]
        if start == "aligned":
            saw("aligned block", not all(fell_back))
            saw("aligned fallback", any(fell_back))
            saw("aligned and fallback in one batch", len(set(fell_back)) == 2)
        saw("forced block", forced)
        saw("forced block, scored first", scored)
        saw("unclosed block", closure == "none" and start == "frontier")
        begun = [False] * len(active)
        for _ in range(rng.randint(1, 3)):
            self.log.clear()
            on = active if rng.randrange(2) else self._some(active, rng)
            same = [(list(ids), o) for ids, o in zip(block.ids, on, strict=True)]
            got = self.state.denoise(block, None if on == active else on)
            self._tell_each(same)
            first = [o and not b for o, b in zip(on, begun, strict=True)]
            begun = [o or b for o, b in zip(on, begun, strict=True)]
            for b, row in enumerate(self.rows):
                if on[b]:
                    self._check_block(got[b], row, block, b)
                    self._after_block(b, row, block, first=first[b])
                else:
                    self._idle(b)
            self._block_ran(first, block)
            for ids, given in zip(block.ids, block.given, strict=True):
                for j in range(given, len(ids)):
                    ids[j] = rng.choice((ids[j], rng.randrange(256), self.model.scheme.mask))

    def _block_ran(self, first: Sequence[bool], block) -> None:
        assert self.log.decoder == 1
        if not any(first) or not block.provisional:
            self._decoder_alone()
        if block.scored:
            self._prompts_settle()

    @staticmethod
    def _some(active: Sequence[bool], rng: Random) -> list[bool]:
        """At least one of the active rows."""
        some = [on and rng.randrange(2) > 0 for on in active]
        return some if any(some) else list(active)

    def _check_block(self, got, row, block, b) -> None:
        ids, start = block.ids[b], block.start[b]
        given = len(row.ids) - start
        assert ids[:given] == row.ids[start:]
        flags = self.true_flags(row) if block.scored else self.flags(row)
        if block.provisional:
            flags = [*flags[:-1], True]
        self.agree(got, block_logits(self.model, row.ids, flags, ids, start))

    def _after_block(self, b, row, block, *, first) -> None:
        start = block.start[b]
        row.decoder += 1
        n = len(row.ids)
        if not first:
            assert not self.log.rows or self.log.rows[0][b][0] == self.log.rows[0][b][1]
            return
        begun, end = self.log.rows[0][b] if self.log.rows else (start, start)
        if not block.provisional:
            assert begun == end or (begun >= row.true and end == start)
            row.true = max(row.true, min(row.known, start))
            return
        if block.scored:
            row.scorer += row.known < n - 1
            row.known = max(row.known, n - 1)
        known = self.flags(row)
        saw("forced block where the flag is known", row.known == n)
        closes = not known[n]
        assert begun == end or (begun >= min(row.true, n - 1) and end == n)
        row.true = min(row.known, n - 1) if closes else n
        row.encoder += self._closed(b, len(patches_of(known)) + closes)
        row.latents -= closes

    def _block_start(self, row, size, start) -> int:
        first, n = self._open_start(row), len(row.ids)
        return first if start == "aligned" and first > 0 and size - (n - first) >= 2 else n

    def _open_start(self, row: RowSpec) -> int:
        """First byte of the patch of the last byte, as far as flags are known."""
        return max(i for i, flag in enumerate(self.flags(row)[:-1]) if flag)

    def _prompts_settle(self) -> None:
        """The pass that reads prompts settles the patches that they end in."""
        for row in self.rows if self.fresh else ():
            if row.known >= row.prompt - 1:
                flags = self.flags(row)
                row.settled = max(i for i in range(row.prompt) if flags[i])
        self.fresh = False

    # -- what ran ----------------------------------------------------------------------------

    def _tell_each(self, asked: Sequence[object]) -> None:
        """Give each row what was computed for it: a first pass computes alike rows once."""
        if not self.computed:
            self.log.tell_each(list(zip([row.ids for row in self.rows], asked, strict=True)))
        self.computed = True

    def _closed(self, b: int, closed: int) -> int:
        """Whether patches up to ``closed`` needed a pass; it ran them and no others."""
        row = self.rows[b]
        ran = self.log.latents[0][b] if self.log.latents else (row.latents, row.latents)
        assert ran == (row.latents, closed)
        before, row.latents = row.latents, closed
        return int(closed > before)

    def _idle(self, b: int) -> None:
        """Row ``b`` takes no part: nothing is computed for it."""
        self.rows[b].idle += 1
        for ran in (*self.log.rows, *self.log.latents):
            assert ran[b][0] == ran[b][1]

    def _decoder_alone(self, passes: int = 1) -> None:
        assert self.log.scorer == 0
        assert not self.log.patches
        assert not self.log.latents
        assert self.log.byte_states == 0 or self.model.decoder.reads_byte_states
        assert self.log.decoder == passes

    def _nothing_ran(self) -> None:
        log = self.log
        assert not any((log.scorer, log.byte_states, log.patches, log.latents, log.decoder))

    # -- choices -----------------------------------------------------------------------------

    def _active(self, rng: Random) -> list[bool]:
        active = [rng.randrange(3) > 0 for _ in self.rows]
        return active if any(active) else [True] * len(active)

    def _asked(self, rng: Random) -> list[int]:
        """How many rows each batch row is asked for; 0 where it takes no part."""
        asked = []
        for row, on in zip(self.rows, self._active(rng), strict=True):
            most = min(len(row.ids) - row.settled, 6)
            asked.append(rng.choice((1, 1, rng.randint(1, most))) if on else 0)
        return asked

    def _refused(self, operation, active: Sequence[object]) -> bool:
        """Whether a row that never had a pass takes part; then drafting must raise."""
        never = any(on and not row.known for row, on in zip(self.rows, active, strict=True))
        if never:
            with pytest.raises(EngineError):
                operation()
            self._nothing_ran()
        return never
