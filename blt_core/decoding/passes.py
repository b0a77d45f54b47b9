"""Passes of a model's parts over the rows of a decode state, each with its cache, all counted.

Every method brings one part up to given positions, all pending rows of the batch in one go; what is
there already is not computed again. Positions are host integers: ``ends[b]`` is where batch row b
shall be; one that takes no part has nothing to do.

Axes: b batch rows, r rows of a pass, m patches, n blocks, B bytes of a block, V ids, D widths.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from math import isnan

import attrs
import torch
from torch import Tensor

from blt_core.decoding.rows import RowState, Tally, latent_before
from blt_core.errors import NO_NUMBERS, EngineError, RunError
from blt_core.faults import broken
from blt_core.model import Model
from blt_core.nn import RowCache
from blt_core.protocols import Cache, ReorderingCache, can_reorder
from blt_core.types import (
    Blocks,
    DecoderOutput,
    Draws,
    Latents,
    OpenBlock,
    Patches,
    Rows,
    Sampling,
)

#: Where the patches of a batch row start, in ascending order; a last one may be provisional.
Bounds = list[int]
#: Numbers that a pass sends to the device: rows of one length.
Table = Sequence[Sequence[int]]


class ModelPasses:
    """The parts of ``model``, their caches for ``rows``, and the passes run so far (``tally``).

    A pass counts for each batch row that takes part, as if it ran alone, and once for the batch.
    """

    def __init__(self, model: Model, rows: Sequence[RowState]) -> None:
        batch = len(rows)
        self._model, self._rows, self._device = model, rows, model.device
        self._patcher = model.patcher.new_cache(batch)
        self._encoder = model.encoder.new_cache(batch)
        # The encoder's byte states, from which patches are embedded; an open patch keeps its own.
        self._states = RowCache(batch, window=1)
        self._global = model.global_model.new_cache(batch)
        self._decoder = model.decoder.new_cache(batch)
        self._ban: Tensor | None = None
        self.tally = Tally()

    @property
    def waits(self) -> bool:
        """Whether a look at numbers waits for the device that computes them."""
        return self._device.type != "cpu"

    @property
    def draws(self) -> bool:
        """Whether ids can be drawn where logits are, in float64."""
        return self._device.type in ("cpu", "cuda")

    # -- the parts -------------------------------------------------------------------------------

    def score(self, ends: Sequence[int]) -> None:
        """Flags 0..ends[b]: the scorer reads the ids before ``ends[b]``."""
        begins = [row.scored for row in self._rows]
        counts = _counts(begins, ends)
        if not any(counts):
            return
        patcher, shape = self._model.patcher, (len(counts), max(counts))
        flags = patcher.flags(self._byte_rows(begins, counts), self._patcher)
        if not isinstance(flags, Tensor) or flags.dtype != torch.bool or flags.shape != shape:
            raise broken(
                patcher,
                f"gave {_shown(flags)} as flags; expected torch.bool {shape}",
                "patcher.shape",
            )
        for row, new, count in zip(self._rows, flags.tolist(), counts, strict=True):
            row.starts += [row.scored + 1 + i for i in range(count) if new[i]]
            row.scored += count
        self._check_lengths("patcher", self._patcher, [row.scored for row in self._rows])
        self._count("scorer", "scorer", begins, counts)

    def encode(self, ends: Sequence[int], rows: Rows | None = None) -> None:
        """The encoder's byte states of the rows before ``ends[b]``.

        rows: the new ones, if they are none of the text yet.
        """
        begins = [row.encoded for row in self._rows]
        counts = _counts(begins, ends)
        if not any(counts):
            return
        rows = self._byte_rows(begins, counts) if rows is None else rows
        states = self._model.encoder.byte_states(rows, self._encoder)
        width, device = states.shape[1], states.device
        span = self._states.extend(counts, width, device, rows.extents_2b)
        self._states.write("states", span, states)
        for row, count in zip(self._rows, counts, strict=True):
            row.encoded += count
        self._check_lengths("encoder", self._encoder, [row.encoded for row in self._rows])
        self._count("encoder_bytes", "encoder", begins, counts)

    def encode_read(self, ends: Sequence[int]) -> None:
        """As ``encode``, if the decoder reads byte states: one pass with that for the patches."""
        if self._model.decoder.reads_byte_states:
            self.encode(ends)

    def close(self, bounds: Sequence[Bounds]) -> Latents | None:
        """Latents of the patches between ``bounds[b]`` that have none yet; None if all have."""
        done = list(self._global.lengths)
        counts = tuple(max(len(at) - 1 - n, 0) for at, n in zip(bounds, done, strict=True))
        if not any(counts):
            return None
        new = [
            at[n : n + k + 1] if k else [] for at, n, k in zip(bounds, done, counts, strict=True)
        ]
        self.encode([at[-1] if at else 0 for at in new])
        firsts = [at[0] if at else 0 for at in new]
        sizes = [[b - a for a, b in pairwise(at)] for at in new]
        start_bm, size_bm, extents_2b, first_1b = self._sent(
            _padded([start - at[0] for start in at[:-1]] for at in new),
            _padded(sizes),
            (done, counts),
            (firsts,),
        )
        patches = Patches(start_bm, size_bm, counts, max(max(row) for row in sizes if row))
        count = max(at[-1] - at[0] for at in new if at)
        states = self._states.take("states", firsts, count, first_1b[0])
        embeddings = self._model.encoder.patch_embeddings(states, patches)
        part, shape = self._model.global_model, (len(counts), max(counts))
        closed = [bisect_left(row.starts, row.settled) for row in self._rows]
        known = extents_2b, _promise(done, counts, closed)
        values = part.forward(Latents(embeddings, counts, *known), self._global)
        if not isinstance(values, Tensor) or values.shape[:2] != shape:
            raise broken(
                part,
                f"gave {_shown(values)} as latents; expected (b, m, D) of {shape}",
                "global_model.shape",
            )
        self._check_lengths("global_model", self._global, _sums(done, counts))
        self._count("encoder", "global_model", done, counts)
        return Latents(values, counts, *known)

    def decode(
        self,
        begins: Sequence[int],
        ends: Sequence[int],
        rows: Sequence[int],
        bounds: Sequence[Bounds],
        latents: Latents | None,
    ) -> Tensor:
        """Logits of the decoder's clean rows [begins, ends); new latents are read too.

        (b, max(rows), V): of the last ``rows[b]`` of each, as the decoder gives them; see
        :meth:`without_banned`.
        """
        skipped = [e - b - on for b, e, on in zip(begins, ends, rows, strict=True)]
        clean, (skipped_1b,) = self._clean_rows(begins, ends, bounds, (skipped,))
        logits = self._logits(begins, clean, latents)
        if len(set(skipped)) == 1:
            return logits[:, skipped[0] : skipped[0] + max(rows)]
        return take(logits, skipped_1b[0], max(rows))

    def write_on(
        self, logits_b1V: Tensor, limits: Sequence[int], sampling: Sampling, draws: Draws
    ) -> list[list[int]]:
        """The id that is chosen for each row, and by each further pass the one after it.

        Up to ``limits[b]`` ids, or an EOS, for which no text is changed yet. logits_b1V: for the
        first; rows read their newest latent. What is chosen goes into the next pass as it is.

        On a CPU it is looked at, so that a row that ended runs no more passes. Elsewhere each look
        would wait for the device: there ids are read once, after all passes. Those that ran for
        nothing after an EOS, which a text meets once, are counted, for they ran.
        """
        left, eos = list(limits), self._model.scheme.eos
        places = DraftPlaces.of(self._rows, limits, self._sent)
        noise = None if sampling.greedy else self._noise(max(limits), logits_b1V.shape[-1], draws)
        highest, best = list[Tensor](), list[Tensor]()
        while True:
            noise_b1V = None if noise is None else noise(len(best))
            highest_b1, best_b1 = sampling.choose(logits_b1V, noise_b1V)
            highest.append(highest_b1)
            best.append(best_b1)
            if not self.waits:
                ended = [token == eos for [token] in best[-1].tolist()]
                if any(ended):
                    most = zip(left, ended, strict=True)
                    left = [min(n, len(best)) if end else n for n, end in most]
                    places = places.stopped(best[-1][:, 0] == eos, len(best))
            counts = tuple(int(most > len(best)) for most in left)
            if not any(counts):
                break
            logits_b1V = self._after(best[-1], counts, places, len(best))
        # What is no number counts as the highest, so the highest tells of it.
        read = torch.cat(best, 1).masked_fill(torch.cat(highest, 1).isnan(), -1).tolist()
        ids = [row[:most] for row, most in zip(read, left, strict=True)]
        if any(-1 in row for row in ids):
            self._drop([max(len(row) - 1, 0) for row in ids])
            raise RunError(NO_NUMBERS)
        kept = [row[: row.index(eos) + 1] if eos in row else row for row in ids]
        if kept != ids:
            self._drop([len(ran) - len(new) for ran, new in zip(ids, kept, strict=True)])
        return kept

    def _noise(self, longest: int, size: int, draws: Draws) -> Callable[[int], Tensor]:
        """(b, 1, V) by number: for the draws of that id of a draft.

        On a CPU it is made when it is asked for; elsewhere that of ``longest`` ids is sent at once.
        """

        def made(numbers: range) -> Tensor:
            places = [(at, len(row.ids) + n) for at, row in enumerate(self._rows) for n in numbers]
            return draws.noise_at(places, size).view(-1, len(numbers), size)

        if not self.waits:
            return lambda number: made(range(number, number + 1))
        noise_bkV = made(range(longest)).to(self._device)
        return lambda number: noise_bkV[:, number, None]

    def _after(
        self, ids_b1: Tensor, counts: tuple[int, ...], places: DraftPlaces, number: int
    ) -> Tensor:
        """Logits (b, 1, V) after id ``number`` of a draft in the rows with ``counts[b] == 1``."""
        begins, states = [row.decoded for row in self._rows], None
        extents_2b = places.extents(places.decoded_b, number)
        if self._model.decoder.reads_byte_states:
            ends = zip(self._rows, counts, strict=True)
            new = Rows(ids_b1, counts, extents_2b=places.extents(places.encoded_b, number))
            self.encode([row.encoded + count for row, count in ends], new)
            first_b = None if extents_2b is None else extents_2b[0]
            states = self._states.take("states", begins, 1, first_b)
        clean = Rows(ids_b1, counts, places.latent_b1, states, extents_2b)
        logits = self._logits(begins, clean, None)
        for row, count in zip(self._rows, counts, strict=True):
            row.decoded += count
        return logits + self._banned(logits)

    def _drop(self, counts: Sequence[int]) -> None:
        """Forget the last ``counts[b]`` rows of ids that are not taken into the text."""
        for row, count in zip(self._rows, counts, strict=True):
            row.decoded -= count
            row.encoded -= count if self._model.decoder.reads_byte_states else 0
        self.rewind()

    def _logits(self, begins: Sequence[int], clean: Rows, latents: Latents | None) -> Tensor:
        """Logits of clean rows of the decoder from ``begins[b]`` on; a pass is counted."""
        output = self._run_decoder(clean, None, latents).clean
        self._count("decoder", "decoder", begins, clean.lengths)
        if output is None:
            raise broken(
                self._model.decoder, "returned no output for its clean rows", "decoder.shape"
            )
        return output.logits

    def denoise(
        self,
        block: OpenBlock,
        active: Sequence[bool],
        begins: Sequence[int],
        ends: Sequence[int],
        bounds: Sequence[Bounds],
        latents: Latents | None,
    ) -> Tensor:
        """Logits (b, B, V) of the block's rows, after the clean rows [begins, ends), if any."""
        size = max(len(ids) for ids in block.ids)
        if any(len(ids) not in (0, size) for ids in block.ids):
            raise EngineError(
                f"the rows of a block have {[*map(len, block.ids)]} ids, not one size"
            )
        # A row that takes no part stands where its cache ends: no place beyond it exists.
        starts = [
            start if on else row.decoded
            for row, start, on in zip(self._rows, block.start, active, strict=True)
        ]
        reads = [latent_before(at, start) for at, start in zip(bounds, starts, strict=True)]
        before = _counts(begins, ends)
        cached = [
            e if n else row.decoded for row, e, n in zip(self._rows, ends, before, strict=True)
        ]
        tables: tuple[Table, ...] = (
            [ids or [0] * size for ids in block.ids],
            [[start] for start in starts],
            [[n] if on else [0] for n, on in zip(reads, active, strict=True)],
            (cached,),
            ([row for row, on in enumerate(active) if on],),
        )
        clean, sent = (
            self._clean_rows(begins, ends, bounds, *tables)
            if any(before)
            else (None, self._sent(*tables))
        )
        ids_bB, start_b1, latent_b1, cached_1b, active_1a = sent
        blocks = Blocks(
            ids_bB[:, None],
            start_b1,
            latent_b1,
            active=tuple(active),
            active_a=active_1a[0],
            cached_b=cached_1b[0],
        )
        output = self._run_decoder(clean, blocks, latents).blocks
        firsts = [start - count for start, count in zip(block.start, before, strict=True)]
        rows = [size + count if on else 0 for count, on in zip(before, active, strict=True)]
        self._count("decoder", "blocks", firsts, rows)
        if output is None:
            raise broken(
                self._model.decoder, "returned no output for its block rows", "decoder.shape"
            )
        return self.without_banned(output.logits[:, 0])

    def _run_decoder(
        self, clean: Rows | None, blocks: Blocks | None, latents: Latents | None
    ) -> DecoderOutput:
        """A pass of the decoder; its caches must be longer by what it was given, and no more."""
        rows, read = list(self._decoder.rows.lengths), list(self._decoder.latents.lengths)
        output = self._model.decoder.forward(clean, blocks, latents, self._decoder)
        rows = rows if clean is None else _sums(rows, clean.lengths)
        read = read if latents is None else _sums(read, latents.counts)
        self._check_lengths("decoder", self._decoder.rows, rows)
        self._check_lengths("decoder", self._decoder.latents, read)
        return output

    # -- caches ----------------------------------------------------------------------------------

    def _check_lengths(self, kind: str, cache: Cache, wanted: list[int]) -> None:
        """Raise ComponentError unless a cache remembers what its part was given."""
        if [*cache.lengths] != wanted:
            text = f"has {[*cache.lengths]} rows in its cache after a pass; it was given {wanted}"
            raise broken(getattr(self._model, kind), text, f"{kind}.lengths")

    def reorders(self) -> bool:
        """Whether all caches can copy what they hold of one batch row to others."""
        return all(map(can_reorder, self._caches()))

    def reorder(self, copied: Sequence[int], rows: Sequence[RowState]) -> None:
        """Go on with ``rows``, of which each is a copy of the former batch row ``copied[b]``."""
        for cache in self._caches():
            if isinstance(cache, ReorderingCache):
                cache.reorder(copied)
        self._rows = rows

    def _caches(self) -> tuple[Cache, ...]:
        decoder = self._decoder
        parts = (self._patcher, self._encoder, self._states, self._global)
        return (*parts, decoder.rows, decoder.latents)

    def rewind(self) -> None:
        """Cut every cache back to what the rows' bookkeeping says."""
        rows, model = self._rows, self._model
        encoded, closed = [row.encoded for row in rows], [row.latents for row in rows]
        rewind_to(self._patcher, [row.scored for row in rows], model.patcher, "patcher")
        rewind_to(self._encoder, encoded, model.encoder, "encoder")
        rewind_to(self._states, encoded)
        rewind_to(self._global, closed, model.global_model, "global_model")
        rewind_to(self._decoder.rows, [row.decoded for row in rows], model.decoder, "decoder")
        rewind_to(self._decoder.latents, closed, model.decoder, "decoder")

    def settle(self) -> None:
        """Let every cache drop what lies behind the rows' settled positions."""
        settled = [row.settled for row in self._rows]
        for cache in (self._patcher, self._encoder, self._states, self._decoder.rows):
            settle_at(cache, settled)
        closed = [bisect_left(row.starts, row.settled) for row in self._rows]
        for cache in (self._global, self._decoder.latents):
            settle_at(cache, closed)

    # -- what the parts are given ----------------------------------------------------------------

    def _clean_rows(
        self,
        begins: Sequence[int],
        ends: Sequence[int],
        bounds: Sequence[Bounds],
        *tables: Table,
    ) -> tuple[Rows, list[Tensor]]:
        """Decoder rows [begins, ends), in place of any that are cached from ``begins[b]`` on.

        And other tables for the same pass, which are sent with them.
        """
        counts = _counts(begins, ends)
        kept = [
            begin if count else row.decoded
            for row, begin, count in zip(self._rows, begins, counts, strict=True)
        ]
        if any(keep < row.decoded for keep, row in zip(kept, self._rows, strict=True)):
            rewind_to(self._decoder.rows, kept, self._model.decoder, "decoder")
        reads = _padded(
            [latent_before(at, i + 1) for i in range(begin, begin + count)]
            for at, begin, count in zip(bounds, begins, counts, strict=True)
        )
        ids_br, latent_br, extents_2b, *sent = self._sent(
            self._ids(begins, counts), reads, (kept, counts), *tables
        )
        states = None
        if self._model.decoder.reads_byte_states:
            states = self._states.take("states", begins, max(counts), extents_2b[0])
        known = extents_2b, _promise(kept, counts, [row.settled for row in self._rows])
        return Rows(ids_br, counts, latent_br, states, *known), sent

    def _byte_rows(self, begins: Sequence[int], counts: Sequence[int]) -> Rows:
        ids_br, extents_2b = self._sent(self._ids(begins, counts), (begins, counts))
        settled = _promise(begins, counts, [row.prompt for row in self._rows])
        return Rows(ids_br, tuple(counts), extents_2b=extents_2b, settled=settled)

    def _ids(self, begins: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
        texts = zip(self._rows, begins, counts, strict=True)
        return _padded(row.ids[begin : begin + count] for row, begin, count in texts)

    def without_banned(self, logits: Tensor) -> Tensor:
        """Ids that are never output get -inf. Raises RunError for logits that are no numbers."""
        # Where a look at numbers waits for them, the choice of an id tells.
        suspect = not self.waits and isnan(logits.sum().item())
        if suspect and bool(logits.isnan().any()):
            raise RunError(NO_NUMBERS)
        return logits + self._banned(logits)

    def _banned(self, logits: Tensor) -> Tensor:
        """(V): -inf for ids that are never output, 0 for others; in the dtype of ``logits``."""
        if self._ban is None or self._ban.dtype != logits.dtype:
            self._ban = logits.new_zeros(logits.shape[-1])
            for token in self._model.scheme.never_output:
                self._ban[token] = float("-inf")
        return self._ban

    def _count(self, field: str, part: str, begins: Sequence[int], counts: Sequence[int]) -> None:
        """Count a pass over ``counts[b]`` rows from ``begins[b]`` on, for those that have any."""
        read = 0
        for row, begin, count in zip(self._rows, begins, counts, strict=True):
            if count:
                row.tally.count(field, part, count, begin)
                read += begin
        self.tally.count(field, part, sum(counts), read)

    def _sent(self, *tables: Table) -> list[Tensor]:
        """Tables of numbers, the rows of each of one length, as int64 tensors: one copy."""
        flat = [number for table in tables for row in table for number in row]
        sent = torch.tensor(flat, dtype=torch.long, device=self._device)
        shapes = [(len(table), len(table[0])) for table in tables]
        parts = sent.split([height * width for height, width in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@attrs.frozen(eq=False)
class DraftPlaces:
    """Where the rows of a draft go, on the device, so that its passes send nothing.

    latent_b1: the latent that each reads. decoded_b, encoded_b: rows before the first pass.
    limits_b: how many ids each batch row gets, of which the first needs no pass.
    """

    latent_b1: Tensor
    decoded_b: Tensor
    encoded_b: Tensor
    limits_b: Tensor

    @classmethod
    def of(
        cls,
        rows: Sequence[RowState],
        limits: Sequence[int],
        sent: Callable[[Table], list[Tensor]],
    ) -> DraftPlaces:
        """Those of drafts that begin at ``rows``; ``sent`` copies a table to the device."""
        latents = [max(row.latents - 1, 0) for row in rows]
        begun = [[row.decoded for row in rows], [row.encoded for row in rows]]
        (table,) = sent([latents, *begun, limits])
        return cls(table[0, :, None], *table[1:])

    def stopped(self, ended_b: Tensor, number: int) -> DraftPlaces:
        """The same, where batch rows have ended with id ``number`` of their drafts."""
        fewer_b = self.limits_b.clamp(max=number).where(ended_b, self.limits_b)
        return attrs.evolve(self, limits_b=fewer_b)

    def extents(self, begun_b: Tensor, number: int) -> Tensor | None:
        """(2, b): where the rows of id ``number`` begin, and which batch rows have one.

        None for one text, where nobody asks for them.
        """
        if len(begun_b) == 1:
            return None
        passed_b = (self.limits_b - 1).clamp(0, number - 1)
        return torch.stack((begun_b + passed_b, (self.limits_b > number).long()))


def take(x_br: Tensor, first_b: Tensor, count: int) -> Tensor:
    """(b, count, D): rows of (b, r, D) from ``first_b[b]`` on; past the end, the last again."""
    at = first_b[:, None] + torch.arange(count, device=x_br.device)
    at = at.clamp(0, x_br.shape[1] - 1)
    return x_br.gather(1, at[..., None].expand(-1, -1, x_br.shape[-1]))


def rewind_to(cache: Cache, lengths: Sequence[int], owner: object = None, kind: str = "") -> None:
    """Rewind a cache to ``lengths``, where it is longer.

    Raises ComponentError, which names its ``owner``, for a cache that then is longer; that of a
    part of the model must be of just that length.
    """
    wanted = [min(n, m) for n, m in zip(cache.lengths, lengths, strict=True)]
    cache.rewind(wanted)
    found = [*cache.lengths]
    if found != wanted and (kind or any(n > m for n, m in zip(found, wanted, strict=True))):
        text = f"has {found} rows in its cache after a rewind to {wanted}"
        raise broken(cache if owner is None else owner, text, kind and f"{kind}.lengths")


def settle_at(cache: Cache, lengths: Sequence[int]) -> None:
    """Settle a cache at ``lengths``, as far as it reaches."""
    cache.settle([min(n, m) for n, m in zip(cache.lengths, lengths, strict=True)])


def _promise(
    begins: Sequence[int], counts: Sequence[int], settled: Sequence[int]
) -> tuple[int, ...] | None:
    """Where no rewind goes below, of the first rows of all texts; None for later ones."""
    return None if any(begins) else tuple(map(min, settled, counts))


def _shown(value: object) -> str:
    """A tensor's dtype and shape, or the type of what is none."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__


def _sums(lengths: Sequence[int], counts: Sequence[int]) -> list[int]:
    return [n + count for n, count in zip(lengths, counts, strict=True)]


def _counts(begins: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    return tuple(max(end - begin, 0) for begin, end in zip(begins, ends, strict=True))


def _padded(rows: Iterable[list[int]]) -> list[list[int]]:
    """Rows of one length, filled with zeros, which nobody reads."""
    listed = list(rows)
    width = max(map(len, listed))
    return [row + [0] * (width - len(row)) for row in listed]
