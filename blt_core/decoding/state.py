"""The decode state: a batch of ragged texts, and what samplers and drafters may do to it.

It is lazy. Committing bytes computes nothing; a pass brings exactly the parts that it needs up to
date, all pending rows in one go. Nothing true is computed twice, except rows dropped by a rewind or
asked for again. The passes themselves are in :mod:`blt_core.decoding.passes`.

Axes: b batch rows, V ids, B bytes of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast

import attrs
import torch
from torch import Tensor

from blt_core.decoding.passes import Bounds, ModelPasses, rewind_to, settle_at
from blt_core.decoding.rows import RowState
from blt_core.errors import EngineError
from blt_core.model import Model
from blt_core.protocols import Cache, CacheT, DecodeOps
from blt_core.types import Draws, IdScheme, Latents, OpenBlock, Passes, Sampling


@attrs.frozen(eq=False)
class Predicted:
    """Logits of a true pass: ``rows[b]`` of each batch row, for the ids from ``starts[b]`` on."""

    logits_brV: Tensor
    starts: tuple[int, ...]
    rows: tuple[int, ...]

    def reorder(self, copied: Sequence[int]) -> Predicted:
        """Batch row b becomes a copy of row ``copied[b]``."""
        return Predicted(
            self.logits_brV[list(copied)],
            tuple(self.starts[row] for row in copied),
            tuple(self.rows[row] for row in copied),
        )


class DecodeState:
    """Implements :class:`blt_core.protocols.DecodeOps` for one model; see there for the contract.

    prompts: ids of each batch row without BOS. limits: bytes that each row may output.
    keeps_predictions: whether the logits of the last true pass can be asked for.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        *,
        keeps_predictions: bool = False,
    ) -> None:
        self._model = model
        texts = [[model.scheme.bos, *prompt] for prompt in prompts]
        self._rows = [RowState(ids, prompt=len(ids)) for ids in texts]
        self._passes = ModelPasses(model, self._rows)
        self._remaining = list(limits)
        self._fresh = True
        self._block: OpenBlock | None = None
        self._begun: list[bool] = []
        self._edits = 0
        self._promised = [0] * len(texts)  # where caches were settled
        self._attached: dict[int, tuple[object, Cache]] = {}
        self._predicted: Predicted | None = None
        self._keeps_predictions = keeps_predictions

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

    @property
    def calls(self) -> Passes:
        """Passes run for the whole batch."""
        return self._passes.tally.passes

    def text(self, row: int, start: int = 0) -> list[int]:
        """The ids of batch row ``row`` from position ``start`` on; position 0 is BOS."""
        return self._rows[row].ids[start:]

    def passes(self, row: int) -> Passes:
        """Passes counted for batch row ``row``, as if it ran alone."""
        return self._rows[row].tally.passes

    def predictions(self, row: int, position: int, count: int) -> Tensor | None:
        """(count, V): what the last true pass said of the ids from ``position`` on, nothing masked.

        None unless it predicted all of them.
        """
        found = self._predicted
        offset = position - found.starts[row] if found is not None else -1
        if found is None or offset < 0 or offset + count > found.rows[row]:
            return None
        return found.logits_brV[row, offset : offset + count]

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
        for index, new in enumerate(ids):
            if not all(0 <= token < self.scheme.size for token in new):
                raise EngineError(
                    f"batch row {index}: {list(new)} are not all ids below {self.scheme.size}"
                )
        self._drop_provisional()
        self._edits += 1
        for row, new in zip(self._rows, ids, strict=True):
            row.ids.extend(new)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Cut each batch row back to ``lengths[b]`` ids (longer than it is: no change)."""
        for index, (row, length) in enumerate(zip(self._rows, lengths, strict=True)):
            if length < row.kept:
                raise EngineError(
                    f"batch row {index}: cannot rewind to {length} ids; "
                    f"the first {row.kept} are settled"
                )
        self._drop_provisional()
        self._edits += 1
        cuts = any(length < n for length, n in zip(lengths, self.lengths, strict=True))
        for row, length in zip(self._rows, lengths, strict=True):
            row.cut(length)
        if cuts:
            self._passes.rewind()
        for owner, cache in self._attached.values():
            rewind_to(cache, self.lengths, owner)

    def settle(self, upto: Sequence[int] | None = None) -> None:
        """Promise not to rewind into patches that ended; caches may drop what lies behind.

        upto: positions, a batch row each, above which nothing is promised.
        """
        for index, row in enumerate(self._rows):
            last = row.open_start if upto is None else row.start_before(upto[index])
            row.settled = max(row.settled, last)
        settled = [row.settled for row in self._rows]
        if self._promised != settled:
            self._passes.settle()
            self._promised = settled
        for _, cache in self._attached.values():
            settle_at(cache, settled)

    def commit(self) -> None:
        """Note what each text is now, for :meth:`rewritten`."""
        for row in self._rows:
            row.commit()

    def rewritten(self, row: int) -> bool:
        """Whether the text of batch row ``row`` as it was at ``commit`` has changed or is cut."""
        return self._rows[row].rewritten

    def charge(self, passes: Sequence[Passes], call: Passes) -> None:
        """Count passes of another model, for each batch row and for the whole batch."""
        for row, new in zip(self._rows, passes, strict=True):
            row.tally.add(new)
        self._passes.tally.add(call)

    def spend(self, row: int, count: int) -> None:
        """Take ``count`` bytes off what batch row ``row`` may still output."""
        self._remaining[row] -= count

    # -- passes over clean rows ------------------------------------------------------------------

    @torch.inference_mode()
    def next_logits(self, rows: Sequence[int]) -> Tensor:
        """True passes; (b, max(rows), V) of the last ``rows[b]`` rows of each batch row."""
        if (firsts := self._alike(rows)) is not None:
            return self._once(firsts, lambda at: self._next_logits([rows[row] for row in at]))
        return self._next_logits(rows)

    def _next_logits(self, rows: Sequence[int]) -> Tensor:
        ends = self._ends(rows)
        self._predicted = None
        self._drop_drafts()
        self._passes.score(ends)
        self._settle_prompts()
        self._passes.encode_read(ends)
        latents = self._passes.close(self._bounds(rows))
        logits = self._decode([row.true for row in self._rows], ends, rows, latents)
        self._fresh = False
        if self._keeps_predictions:
            starts = tuple(end - on + 1 for end, on in zip(ends, rows, strict=True))
            # A copy: what is given may be the end of the logits of a whole prompt.
            self._predicted = Predicted(logits.clone(), starts, tuple(rows))
        return self._passes.without_banned(logits)

    @torch.inference_mode()
    def draft_logits(self, rows: Sequence[int]) -> Tensor:
        """Decoder only; bytes whose next flag is unknown read the newest computed latent."""
        ends = self._ends(rows)
        self._refuse_fresh(rows)
        self._drop_provisional()
        self._passes.encode_read(ends)
        logits = self._decode([row.decoded for row in self._rows], ends, rows, None)
        return self._passes.without_banned(logits)

    @torch.inference_mode()
    def draft(self, limits: Sequence[int], sampling: Sampling, draws: Draws) -> list[list[int]]:
        """At most ``limits[b]`` ids of the decoder alone, which are appended; up to an EOS.

        They are those of the default of ``DecodeOps``, chosen where their logits are. A device
        without float64, which draws want, takes that default.
        """
        if not any(limits) or not (sampling.greedy or self._passes.draws):
            return DecodeOps.draft(self, limits, sampling, draws)
        logits = self.draft_logits([int(most > 0) for most in limits])
        ids = self._passes.write_on(logits, limits, sampling, draws)
        self.append(ids)
        return ids

    def _decode(
        self,
        done: Sequence[int],
        ends: Sequence[int],
        rows: Sequence[int],
        latents: Latents | None,
    ) -> Tensor:
        """The decoder up to ``ends``, from ``done`` on or from the first row asked for."""
        begins = [min(n, end - on) for n, end, on in zip(done, ends, rows, strict=True)]
        logits = self._passes.decode(begins, ends, rows, self._bounds(rows), latents)
        self._advance(begins, ends, None)
        return logits

    # -- passes over blocks ----------------------------------------------------------------------

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
        if size < 1:
            raise EngineError(f"a block has at least 1 byte, not {size}")
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
            ids,
            tuple(starts),
            tuple(given),
            provisional=forced,
            scored=forced and scored,
            edits=self._edits,
        )

    @torch.inference_mode()
    def denoise(self, block: OpenBlock, active: Sequence[bool] | None = None) -> Tensor:
        """One decoder pass over the block: (b, B, V); the first runs what the block needs."""
        active = active or [True] * len(self._rows)
        active = [bool(ids) and on for ids, on in zip(block.ids, active, strict=True)]
        if not any(active):
            raise EngineError("no batch row takes part in this block")
        if block.edits != self._edits:
            raise EngineError("this block was opened on a text that has changed since")
        if not block.scored:
            self._refuse_fresh(active)
        if (firsts := self._alike(list(zip(block.ids, active, strict=True)))) is not None:
            return self._denoise_once(firsts, block, active)
        return self._denoise(block, active)

    def _denoise(self, block: OpenBlock, active: Sequence[bool]) -> Tensor:
        if block is not self._block:
            if block.provisional:
                self._drop_drafts()
            else:
                self._drop_provisional()
            self._block, self._begun = block, [False] * len(active)
        # What a block needs is run for each row once, in the first pass that the row takes part in.
        new = [on and not begun for on, begun in zip(active, self._begun, strict=True)]
        self._begun = [on or begun for on, begun in zip(active, self._begun, strict=True)]
        begins, ends, latents = self._prepare(block, new)
        bounds = self._bounds(active, block)
        logits = self._passes.denoise(block, active, begins, ends, bounds, latents)
        self._advance(begins, ends, block)
        return logits

    def _prepare(
        self, block: OpenBlock, new: Sequence[bool]
    ) -> tuple[list[int], list[int], Latents | None]:
        """Clean rows [begins, ends) and new latents that the ``new`` rows of a block need first."""
        ends = [first if on else 0 for first, on in zip(block.start, new, strict=True)]
        if not block.provisional:
            # An aligned block starts at a byte that is decoded already: nothing is left to run.
            return [min(r.decoded, e) for r, e in zip(self._rows, ends, strict=True)], ends, None
        if block.scored:
            self._passes.score([max(end - 1, 0) for end in ends])
            self._settle_prompts()
        latents = self._passes.close(self._bounds(new, block))
        # The row before the block reads the provisional latent, even where it was true.
        begins = [
            max(min(row.decoded, end - 1 if self._closes(row, block) else end), 0)
            for row, end in zip(self._rows, ends, strict=True)
        ]
        self._fresh = False
        return begins, ends, latents

    # -- texts that begin alike ------------------------------------------------------------------

    def _alike(self, asked: Sequence[object]) -> list[int] | None:
        """For each batch row the first with the same text, of which the same is asked.

        None where nothing is gained, or where a part has computed something already: only a first
        pass, which reads the prompts, is shared.
        """
        if not self._fresh or any(row.scored or row.decoded or row.encoded for row in self._rows):
            return None
        texts = [(row.ids, each) for row, each in zip(self._rows, asked, strict=True)]
        firsts = [texts.index(text) for text in texts]
        alike = len(set(firsts)) < len(firsts)
        return firsts if alike and self._passes.reorders() else None

    def _once(self, firsts: Sequence[int], run: Callable[[list[int]], Tensor]) -> Tensor:
        """What ``run`` gives for the rows that it is told of, and copies of it for those alike."""
        at = list(dict.fromkeys(firsts))
        copied = [at.index(first) for first in firsts]
        rows, remaining = self._rows, self._remaining
        self._rows, self._remaining = [rows[row] for row in at], [remaining[row] for row in at]
        self._passes = ModelPasses(self._model, self._rows)
        try:
            given = run(at)
            rows = [self._rows[row].copy() for row in copied]
            self._passes.reorder(copied, rows)
        finally:
            self._rows, self._remaining = rows, remaining
        if self._predicted is not None:
            self._predicted = self._predicted.reorder(copied)
        return given.index_select(0, torch.tensor(copied, device=given.device))

    def _denoise_once(
        self, firsts: Sequence[int], block: OpenBlock, active: Sequence[bool]
    ) -> Tensor:
        """The first pass over a block, for one of the texts that are alike."""

        def run(at: list[int]) -> Tensor:
            ids, start = [block.ids[row] for row in at], tuple(block.start[row] for row in at)
            given = tuple(block.given[row] for row in at)
            one = attrs.evolve(block, ids=ids, start=start, given=given)
            return self._denoise(one, [active[row] for row in at])

        logits = self._once(firsts, run)
        self._block, self._begun = block, list(active)
        return logits

    # -- what is true, and what is dropped -------------------------------------------------------

    @staticmethod
    def _closes(row: RowState, block: OpenBlock | None) -> bool:
        """Whether the block closes the row's open patch by force."""
        return block is not None and block.provisional and row.starts[-1] < len(row.ids)

    def _bounds(self, active: Sequence[object], block: OpenBlock | None = None) -> list[Bounds]:
        """Known patch starts of the active rows, and the end of a text whose patch is forced."""
        return [
            []
            if not on
            else [*row.starts, len(row.ids)]
            if self._closes(row, block)
            else row.starts
            for row, on in zip(self._rows, active, strict=True)
        ]

    def _advance(self, begins: Sequence[int], ends: Sequence[int], block: OpenBlock | None) -> None:
        """Record decoder rows [begins, ends) and how many of all cached rows are true now."""
        for row, begin, end in zip(self._rows, begins, ends, strict=True):
            if end <= begin:
                continue
            row.decoded = end
            # A forced closure makes row n - 1 read a provisional latent: that row is not true.
            known = min(row.scored, len(row.ids) - 1) if self._closes(row, block) else row.scored
            row.true = min(end, known) if begin <= row.true else row.true

    def _settle_prompts(self) -> None:
        """Settle prompts while they are read, so that windows need not hold all of them."""
        if self._fresh:
            for row in self._rows:
                row.settle_prompt()

    def _drop_provisional(self) -> None:
        """Leave the block, and with it a latent that was provisional."""
        if self._block is not None and self._block.provisional:
            self._drop_drafts()
        self._block = None

    def _drop_drafts(self) -> None:
        """Leave only true rows and true latents in the caches."""
        provisional = self._block is not None and self._block.provisional
        self._block = None
        if provisional or any(row.decoded > row.true for row in self._rows):
            for row in self._rows:
                row.decoded = row.true
            self._passes.rewind()

    # -- refusals --------------------------------------------------------------------------------

    def _ends(self, rows: Sequence[int]) -> list[int]:
        """Where rows are to be decoded to: the end of each text that takes part."""
        if not any(rows):
            raise EngineError("no batch row takes part in this pass")
        for index, (row, count) in enumerate(zip(self._rows, rows, strict=True)):
            if not 0 <= count <= len(row.ids):
                raise EngineError(
                    f"batch row {index}: asked for the logits of {count} of {len(row.ids)} rows"
                )
            if count and len(row.ids) - count < row.settled:
                raise EngineError(f"batch row {index}: rows before {row.settled} are settled")
        return [len(row.ids) if on else 0 for row, on in zip(self._rows, rows, strict=True)]

    def _refuse_fresh(self, taking_part: Sequence[object]) -> None:
        """Raise for a row that takes part but has no latent that a draft could read."""
        if any(on and not row.latents for row, on in zip(self._rows, taking_part, strict=True)):
            raise EngineError("nothing can be drafted before a first true pass (next_logits)")
