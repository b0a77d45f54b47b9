"""The decode state: a batch of ragged rows, their flags, latents and caches, and the passes.

It is lazy. Committing bytes computes nothing; a pass brings exactly the components that it needs
up to date, all pending rows in one go, and counts what it ran. Nothing true is computed twice,
except rows dropped by a rewind or asked for again.

Axes: b batch rows, r rows of a pass, m patches, B bytes of a block, V ids, D widths.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, cast

import attrs
import torch
from torch import Tensor

from blt_core.errors import EngineError
from blt_core.model import Model
from blt_core.nn import RowCache
from blt_core.protocols import Cache, CacheT
from blt_core.types import (
    Blocks,
    DecoderOutput,
    IdScheme,
    Latents,
    OpenBlock,
    Passes,
    Patches,
    Rows,
)


@attrs.define
class RowState:
    """Bookkeeping of one batch row of n ids.

    starts: positions whose flag is known and set, so byte j opens a patch iff j is among them.
    scored: ids that the scorer has read; flags 0..scored are known. encoded: byte rows that the
    encoder has run. decoded: decoder rows in the cache, of which the first ``true`` are true and
    the rest stale or provisional. A row is true if its flag was known and all rows before it were
    true. The latents of all known closed patches are computed: ``len(starts) - 1`` of them.
    """

    ids: list[int]
    starts: list[int] = attrs.field(factory=lambda: [0])
    scored: int = 0
    encoded: int = 0
    decoded: int = 0
    true: int = 0
    settled: int = 0
    passes: Passes = attrs.field(factory=Passes)

    @property
    def latents(self) -> int:
        """Latents of closed patches, given the known flags."""
        return len(self.starts) - 1

    @property
    def open_start(self) -> int:
        """The first byte of the patch of the last id, as far as flags are known."""
        return self.starts[bisect_right(self.starts, len(self.ids) - 1) - 1]

    def cut(self, length: int) -> None:
        """Keep ``length`` ids, flags 0..length, and what was computed from these."""
        del self.ids[length:]
        del self.starts[bisect_right(self.starts, length) :]
        self.scored = min(self.scored, length)
        self.encoded = min(self.encoded, length)
        self.decoded = min(self.decoded, length)
        self.true = min(self.true, length)


class DecodeState:
    """Implements :class:`blt_core.protocols.DecodeOps` for one model; see there for the contract.

    prompts: ids of each batch row without BOS. limits: bytes that each row may output.
    """

    def __init__(
        self, model: Model, prompts: Sequence[Sequence[int]], limits: Sequence[int]
    ) -> None:
        batch = len(prompts)
        self._model = model
        self._rows = [RowState([model.scheme.bos, *prompt]) for prompt in prompts]
        self._remaining = list(limits)
        self._fresh = True
        self._block: OpenBlock | None = None
        self._begun: list[bool] = []
        self._patcher = model.patcher.new_cache(batch)
        self._encoder = model.encoder.new_cache(batch)
        self._states = RowCache(batch)  # the encoder's byte states, for patches not yet closed
        self._global = model.global_model.new_cache(batch)
        self._decoder = model.decoder.new_cache(batch)
        self._attached: dict[int, tuple[object, Cache]] = {}
        self._banned = torch.tensor(model.scheme.never_output, device=model.device)
        self.calls = Passes()

    # -- what samplers see -----------------------------------------------------------------------

    @property
    def scheme(self) -> IdScheme:
        """The model's id scheme."""
        return self._model.scheme

    @property
    def lengths(self) -> tuple[int, ...]:
        """Ids of each batch row, BOS included."""
        return tuple(len(row.ids) for row in self._rows)

    @property
    def remaining(self) -> tuple[int, ...]:
        """Bytes that may still be output; 0 for a finished row."""
        return tuple(self._remaining)

    @property
    def fresh(self) -> bool:
        """True until the first true pass."""
        return self._fresh

    def text(self, row: int) -> list[int]:
        """The ids of batch row ``row``, BOS included."""
        return list(self._rows[row].ids)

    def passes(self, row: int) -> Passes:
        """Passes counted for batch row ``row``, as if it ran alone."""
        return self._rows[row].passes

    def flags(self, row: int) -> list[bool]:
        """The known flags of batch row ``row``: flags 0 to the number of scored ids."""
        starts = set(self._rows[row].starts)
        return [i in starts for i in range(self._rows[row].scored + 1)]

    def attach(self, owner: object, make: Callable[[int], CacheT]) -> CacheT:
        """The cache of ``owner``, made by ``make(batch)`` on first use; it follows this state."""
        if id(owner) not in self._attached:
            self._attached[id(owner)] = (owner, make(len(self._rows)))
        return cast("CacheT", self._attached[id(owner)][1])

    # -- changing the text: no computation -------------------------------------------------------

    def append(self, ids: Sequence[Sequence[int]]) -> None:
        """Add ids to each batch row."""
        self._drop_provisional()
        for row, new in zip(self._rows, ids, strict=True):
            row.ids.extend(new)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Cut each batch row back to ``lengths[b]`` ids (longer than it is: no change)."""
        self._drop_provisional()
        for index, (row, length) in enumerate(zip(self._rows, lengths, strict=True)):
            # The first byte of the settled patch stays, so that its patch is that of the last id.
            if length <= row.settled:
                raise EngineError(
                    f"batch row {index}: cannot rewind to {length} ids; "
                    f"the first {row.settled + 1} are settled"
                )
            row.cut(length)
        self._rewind_caches()
        for _, cache in self._attached.values():
            cache.rewind([min(n, m) for n, m in zip(cache.lengths, self.lengths, strict=True)])

    def settle(self) -> None:
        """Promise not to rewind into patches that ended; caches may drop what lies behind."""
        for row in self._rows:
            row.settled = max(row.settled, row.open_start)
        rows = self._rows
        settled = [row.settled for row in rows]
        closed = [bisect_right(row.starts, row.settled) - 1 for row in rows]
        for cache in (self._patcher, self._encoder, self._states, self._decoder.rows):
            cache.settle([min(n, s) for n, s in zip(cache.lengths, settled, strict=True)])
        for cache in (self._global, self._decoder.latents):
            cache.settle(closed)
        for _, cache in self._attached.values():
            cache.settle([min(n, s) for n, s in zip(cache.lengths, settled, strict=True)])

    def spend(self, row: int, count: int) -> None:
        """Take ``count`` bytes off what batch row ``row`` may still output."""
        self._remaining[row] -= count

    # -- passes ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def next_logits(self, rows: Sequence[int]) -> Tensor:
        """True passes; (b, max(rows), V) of the last ``rows[b]`` rows of each batch row."""
        self._check_rows(rows)
        self._drop_drafts()
        ends = [len(row.ids) if on else 0 for row, on in zip(self._rows, rows, strict=True)]
        self._score(ends)
        self._encode_read(ends)
        latents = self._close(
            [row.starts if on else [] for row, on in zip(self._rows, rows, strict=True)]
        )
        begins = [
            min(row.true, end - on) for row, end, on in zip(self._rows, ends, rows, strict=True)
        ]
        logits = self._run_rows(begins, ends, latents)
        self._fresh = False
        return self._last(logits, begins, ends, rows)

    @torch.inference_mode()
    def draft_logits(self, rows: Sequence[int]) -> Tensor:
        """Decoder only; bytes whose next flag is unknown read the newest computed latent."""
        self._check_rows(rows)
        self._refuse_fresh(rows)
        self._drop_provisional()
        ends = [len(row.ids) if on else 0 for row, on in zip(self._rows, rows, strict=True)]
        begins = [
            min(row.decoded, end - on) for row, end, on in zip(self._rows, ends, rows, strict=True)
        ]
        self._encode_read(ends)
        logits = self._run_rows(begins, ends, None)
        return self._last(logits, begins, ends, rows)

    def open_block(
        self,
        size: int,
        *,
        start: Literal["aligned", "frontier"],
        closure: Literal["forced", "none"] = "none",
        scored: bool = False,
        active: Sequence[bool] | None = None,
    ) -> OpenBlock:
        """A block of ``size`` bytes per batch row; ``closure`` is for a frontier start only."""
        if self.scheme.mask is None or not self._model.decoder.denoises:
            raise EngineError("this model's decoder cannot denoise: it was trained without blocks")
        if active is None:
            active = [left > 0 for left in self._remaining]
        ids, starts, given = [], [], []
        for row, on in zip(self._rows, active, strict=True):
            n = len(row.ids)
            # Training has blocks at patch starts with a latent before them, so not at BOS.
            fits = start == "aligned" and row.open_start > 0 and size - (n - row.open_start) > 1
            first = row.open_start if fits else n
            starts.append(first)
            given.append(n - first)
            ids.append(row.ids[first:] + [self.scheme.mask] * (size - n + first) if on else [])
        forced = start == "frontier" and closure == "forced"
        return OpenBlock(
            ids, tuple(starts), tuple(given), provisional=forced, scored=forced and scored
        )

    @torch.inference_mode()
    def denoise(self, block: OpenBlock, active: Sequence[bool] | None = None) -> Tensor:
        """One decoder pass over the block: (b, B, V); the first runs what the block needs."""
        on_block = [bool(ids) for ids in block.ids]
        active = (
            on_block if active is None else [a and b for a, b in zip(active, on_block, strict=True)]
        )
        if not any(active):
            raise EngineError("no batch row takes part in this block")
        for row, first, count, on in zip(self._rows, block.start, block.given, active, strict=True):
            if on and len(row.ids) != first + count:
                raise EngineError("this block was opened on a text that has changed since")
        if not block.scored:
            self._refuse_fresh(active)
        if block is not self._block:
            if block.provisional:
                self._drop_drafts()
            else:
                self._drop_provisional()
            self._block, self._begun = block, [False] * len(active)
        # What a block needs is run for each row once, in the first pass that the row takes part in.
        new = [on and not begun for on, begun in zip(active, self._begun, strict=True)]
        self._begun = [on or begun for on, begun in zip(active, self._begun, strict=True)]
        latents = None
        if block.provisional:
            ends = [len(row.ids) if on else 0 for row, on in zip(self._rows, new, strict=True)]
            if block.scored:
                self._score([max(end - 1, 0) for end in ends])
            latents = self._close(
                [
                    self._bounds(row, block) if on else []
                    for row, on in zip(self._rows, new, strict=True)
                ]
            )
            # The row before the block reads the provisional latent, even where it was true.
            begins = [
                min(row.decoded, end - 1) if self._closes(row, block) else min(row.decoded, end)
                for row, end in zip(self._rows, ends, strict=True)
            ]
            begins = [max(begin, 0) for begin in begins]
            self._fresh = False
        else:
            # The rows before the block; an aligned block starts at a byte that is decoded already.
            ends = [first if on else 0 for first, on in zip(block.start, new, strict=True)]
            begins = [min(row.decoded, end) for row, end in zip(self._rows, ends, strict=True)]
        return self._run_block(block, active, begins, ends, latents)

    # -- the components --------------------------------------------------------------------------

    def _score(self, ends: Sequence[int]) -> None:
        """Bring flags up to ``ends[b]``: the scorer reads the ids before it."""
        counts = [max(end - row.scored, 0) for row, end in zip(self._rows, ends, strict=True)]
        if not any(counts):
            return
        begins = [row.scored for row in self._rows]
        flags = self._model.patcher.flags(self._byte_rows(begins, counts), self._patcher).tolist()
        for row, new, count in zip(self._rows, flags, counts, strict=True):
            row.starts += [row.scored + 1 + i for i in range(count) if new[i]]
            row.scored += count
        self._count(counts, Passes(scorer=1))

    def _encode(self, ends: Sequence[int]) -> None:
        """Bring the encoder's byte states up to ``ends[b]``."""
        counts = [max(end - row.encoded, 0) for row, end in zip(self._rows, ends, strict=True)]
        if not any(counts):
            return
        begins = [row.encoded for row in self._rows]
        states = self._model.encoder.byte_states(self._byte_rows(begins, counts), self._encoder)
        span = self._states.extend(counts, states.shape[1], states.device)
        self._states.write("states", span, states)
        for row, count in zip(self._rows, counts, strict=True):
            row.encoded += count
        self._count(counts, Passes(encoder_bytes=1))

    def _encode_read(self, ends: Sequence[int]) -> None:
        """Byte states up to ``ends[b]``, if the decoder reads them: one pass with the patches."""
        if self._model.decoder.reads_byte_states:
            self._encode(ends)

    def _close(self, bounds: Sequence[Sequence[int]]) -> Latents | None:
        """Embeddings and latents of the patches between ``bounds[b]`` that have none yet."""
        done = self._global.lengths
        counts = tuple(max(len(at) - 1 - n, 0) for at, n in zip(bounds, done, strict=True))
        if not any(counts):
            return None
        self._encode([at[-1] if count else 0 for at, count in zip(bounds, counts, strict=True)])
        new = [
            list(at[n : n + count + 1]) for at, n, count in zip(bounds, done, counts, strict=True)
        ]
        lo = min(at[0] for at, count in zip(new, counts, strict=True) if count)
        hi = max(at[-1] for at, count in zip(new, counts, strict=True) if count)
        width = max(counts)
        starts = [
            [a - lo for a in at[:count]] + [0] * (width - count)
            for at, count in zip(new, counts, strict=True)
        ]
        sizes = [
            [b - a for a, b in pairwise(at)][:count] + [0] * (width - count)
            for at, count in zip(new, counts, strict=True)
        ]
        patches = Patches(self._tensor(starts), self._tensor(sizes), counts)
        embeddings = self._model.encoder.patch_embeddings(
            self._states.read("states", lo, hi), patches
        )
        values = self._model.global_model.forward(Latents(embeddings, counts), self._global)
        self._count(counts, Passes(encoder=1))
        return Latents(values, counts)

    def _run_rows(
        self, begins: Sequence[int], ends: Sequence[int], latents: Latents | None
    ) -> Tensor:
        """A decoder pass over clean rows [begins, ends); their logits."""
        if not any(end > begin for begin, end in zip(begins, ends, strict=True)):
            raise EngineError("no batch row takes part in this pass")
        clean = self._clean_rows(begins, ends, None)
        output = self._decode(clean, None, latents)
        self._advance(begins, ends, None)
        self._count(clean.lengths, Passes(decoder=1))
        if output.clean is None:
            raise EngineError("the decoder returned no output for its clean rows")
        return output.clean.logits

    def _run_block(
        self,
        block: OpenBlock,
        active: Sequence[bool],
        begins: Sequence[int],
        ends: Sequence[int],
        latents: Latents | None,
    ) -> Tensor:
        """A decoder pass over clean rows [begins, ends), if any, and the block's rows."""
        pending = any(end > begin for begin, end in zip(begins, ends, strict=True))
        clean = self._clean_rows(begins, ends, block) if pending else None
        size = max(len(ids) for ids in block.ids)
        # A row that takes no part stands where its cache ends: no place beyond it exists.
        starts = [
            s if on else row.decoded
            for row, s, on in zip(self._rows, block.start, active, strict=True)
        ]
        latent = [
            max(bisect_right(self._bounds(row, block), s) - 2, 0) if on else 0
            for row, s, on in zip(self._rows, starts, active, strict=True)
        ]
        blocks = Blocks(
            self._tensor([[ids or [0] * size] for ids in block.ids]),
            self._tensor([[s] for s in starts]),
            self._tensor([[index] for index in latent]),
        )
        output = self._decode(clean, blocks, latents)
        if clean is not None:
            self._advance(begins, ends, block)
        self._count(active, Passes(decoder=1))
        if output.blocks is None:
            raise EngineError("the decoder returned no output for its block rows")
        return self._without_banned(output.blocks.logits[:, 0])

    def _decode(
        self, clean: Rows | None, blocks: Blocks | None, latents: Latents | None
    ) -> DecoderOutput:
        return self._model.decoder.forward(clean, blocks, latents, self._decoder)

    def _clean_rows(
        self, begins: Sequence[int], ends: Sequence[int], block: OpenBlock | None
    ) -> Rows:
        """Rows [begins, ends) with the latents they read, as flags are known (or forced) now."""
        kept = [
            b if e > b else row.decoded for row, b, e in zip(self._rows, begins, ends, strict=True)
        ]
        self._decoder.rows.rewind(
            [min(n, k) for n, k in zip(self._decoder.rows.lengths, kept, strict=True)]
        )
        counts = [max(end - begin, 0) for begin, end in zip(begins, ends, strict=True)]
        width = max(counts)
        latent = []
        for row, begin, count in zip(self._rows, begins, counts, strict=True):
            bounds = self._bounds(row, block)
            read = [bisect_right(bounds, i + 1) - 2 for i in range(begin, begin + count)]
            latent.append([max(index, 0) for index in read] + [0] * (width - count))
        rows = self._byte_rows(begins, counts)
        states = None
        if self._model.decoder.reads_byte_states:
            states = self._states_of(begins, counts)
        return Rows(rows.ids_br, rows.lengths, self._tensor(latent), states)

    def _states_of(self, begins: Sequence[int], counts: Sequence[int]) -> Tensor:
        """(b, max(counts), D): the encoder's states of the rows from ``begins[b]`` on."""
        stored = self._states.read("states", 0, None)
        at = self._tensor(begins)[:, None] + torch.arange(max(counts), device=stored.device)
        at = at.clamp(max=stored.shape[1] - 1)
        return stored.gather(1, at[..., None].expand(-1, -1, stored.shape[-1]))

    def _advance(self, begins: Sequence[int], ends: Sequence[int], block: OpenBlock | None) -> None:
        """Record decoder rows [begins, ends) and how many of all cached rows are true now."""
        for row, begin, end in zip(self._rows, begins, ends, strict=True):
            if end <= begin:
                continue
            row.decoded = end
            # A forced closure makes row n - 1 read a provisional latent: that row is not true.
            known = min(row.scored, len(row.ids) - 1) if self._closes(row, block) else row.scored
            row.true = min(end, known) if begin <= row.true else row.true

    # -- dropping what was only provisional ------------------------------------------------------

    @staticmethod
    def _closes(row: RowState, block: OpenBlock | None) -> bool:
        """Whether the block closes the row's open patch by force."""
        return block is not None and block.provisional and row.starts[-1] < len(row.ids)

    def _bounds(self, row: RowState, block: OpenBlock | None) -> list[int]:
        """Known patch starts, and the end of the text where a block closes the open patch."""
        return [*row.starts, len(row.ids)] if self._closes(row, block) else row.starts

    def _drop_provisional(self) -> None:
        block, self._block = self._block, None
        if block is None or not block.provisional:
            return
        for row in self._rows:
            row.decoded = row.true
        self._rewind_caches()

    def _drop_drafts(self) -> None:
        """Leave only true rows and true latents in the caches."""
        self._block = None
        for row in self._rows:
            row.decoded = row.true
        self._rewind_caches()

    def _rewind_caches(self) -> None:
        rows = self._rows
        for cache, lengths in (
            (self._patcher, [row.scored for row in rows]),
            (self._encoder, [row.encoded for row in rows]),
            (self._states, [row.encoded for row in rows]),
            (self._global, [row.latents for row in rows]),
            (self._decoder.rows, [row.decoded for row in rows]),
            (self._decoder.latents, [row.latents for row in rows]),
        ):
            cache.rewind([min(n, m) for n, m in zip(cache.lengths, lengths, strict=True)])

    # -- small helpers ---------------------------------------------------------------------------

    def _check_rows(self, rows: Sequence[int]) -> None:
        for index, (row, count) in enumerate(zip(self._rows, rows, strict=True)):
            if not 0 <= count <= len(row.ids):
                raise EngineError(
                    f"batch row {index}: asked for the logits of {count} of {len(row.ids)} rows"
                )
            if count and len(row.ids) - count < row.settled:
                raise EngineError(f"batch row {index}: rows before {row.settled} are settled")

    def _refuse_fresh(self, taking_part: Sequence[object]) -> None:
        """Raise for a row that takes part but has no latent that a draft could read."""
        if any(on and not row.latents for row, on in zip(self._rows, taking_part, strict=True)):
            raise EngineError("nothing can be drafted before a first true pass (next_logits)")

    def _count(self, taking_part: Sequence[object], one: Passes) -> None:
        """Count a pass for the batch rows that took part, and once for the batch."""
        for row, on in zip(self._rows, taking_part, strict=True):
            if on:
                row.passes += one
        self.calls += one

    def _byte_rows(self, begins: Sequence[int], counts: Sequence[int]) -> Rows:
        width = max(counts)
        ids = [
            row.ids[begin : begin + count] + [0] * (width - count)
            for row, begin, count in zip(self._rows, begins, counts, strict=True)
        ]
        return Rows(self._tensor(ids), tuple(counts))

    def _last(
        self, logits: Tensor, begins: Sequence[int], ends: Sequence[int], rows: Sequence[int]
    ) -> Tensor:
        """The last ``rows[b]`` of the rows [begins, ends), at the front: (b, max(rows), V)."""
        width = max(rows)
        skip = [end - begin - on for begin, end, on in zip(begins, ends, rows, strict=True)]
        if len(set(skip)) == 1:
            return self._without_banned(logits[:, skip[0] : skip[0] + width])
        at = self._tensor([max(s, 0) for s in skip])[:, None] + torch.arange(
            width, device=logits.device
        )
        at = at.clamp(max=logits.shape[1] - 1)
        return self._without_banned(
            logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))
        )

    def _without_banned(self, logits: Tensor) -> Tensor:
        """Ids that are never output get -inf."""
        return logits.index_fill(-1, self._banned, float("-inf"))

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._model.device)
