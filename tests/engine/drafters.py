"""Drafters for the properties, written from the public operations alone, good ones and bad ones.

What a drafter proposes for a row depends on that row's text only, so that batches can be compared
with single requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

import attrs

from blt_core.protocols import DecodeOps, Drafter
from blt_core.types import Draft, Draws, Sampling


@attrs.frozen
class RandomBytes:
    """``count`` random bytes, or EOS now and then."""

    seed: int
    count: int

    def draft(
        self, ops: DecodeOps, limit: Sequence[int], sampling: Sampling, draws: Draws
    ) -> Draft:
        """Nothing is computed."""
        rngs = [Random(self.seed * 1000 + length) for length in ops.lengths]
        most = [min(self.count, left) for left in limit]
        return Draft(
            [[self._pick(r, ops) for _ in range(k)] for r, k in zip(rngs, most, strict=True)]
        )

    @staticmethod
    def _pick(rng: Random, ops: DecodeOps) -> int:
        return ops.scheme.eos if rng.random() < 0.1 else rng.randrange(256)


@attrs.frozen
class Oracle:
    """Knows what will be generated after each prompt, and corrupts a share of it.

    texts: prompt ids (BOS included) to all ids of the finished text.
    """

    texts: dict[tuple[int, ...], list[int]]
    count: int
    errors: float
    seed: int

    def draft(
        self, ops: DecodeOps, limit: Sequence[int], sampling: Sampling, draws: Draws
    ) -> Draft:
        """The known continuation, with errors; junk where it has ended."""
        ids = []
        for row, most in enumerate(limit):
            text = ops.text(row)
            rng = Random(self.seed * 1000 + len(text))
            known = next((t for t in self.texts.values() if t[: len(text)] == text), text)
            right = (known[len(text) :] + [7] * self.count)[: min(self.count, most)]
            ids.append([(t + 1) % 256 if rng.random() < self.errors else t for t in right])
        return Draft(ids)


@attrs.frozen
class BlockSteps:
    """Fills a block by ``steps`` denoising passes, left to right."""

    size: int
    steps: int
    start: Literal["aligned", "frontier"]
    closure: Literal["forced", "none"]

    def draft(
        self, ops: DecodeOps, limit: Sequence[int], sampling: Sampling, draws: Draws
    ) -> Draft:
        """The most probable bytes of a block."""
        return Draft(self.fill(ops, [most > 0 for most in limit]))

    def fill(self, ops: DecodeOps, active: Sequence[bool]) -> list[list[int]]:
        """New ids of a filled block for each active row."""
        block = ops.open_block(self.size, start=self.start, closure=self.closure, active=active)
        for step in range(self.steps):
            best = ops.denoise(block).argmax(-1).tolist()
            until = self.size * (step + 1) // self.steps
            for ids, choice in zip(block.ids, best, strict=True):
                for j in range(len(ids)):
                    if ids[j] == ops.scheme.mask and (j < until or step == self.steps - 1):
                        ids[j] = choice[j]
        return [ids[given:] for ids, given in zip(block.ids, block.given, strict=True)]


@attrs.frozen
class Cascade:
    """``rounds`` times: fills a block, keeps what the decoder alone confirms, adds its byte."""

    blocks: BlockSteps
    rounds: int

    def draft(
        self, ops: DecodeOps, limit: Sequence[int], sampling: Sampling, draws: Draws
    ) -> Draft:
        """Leaves the state longer than it was: the caller rewinds it."""
        done: list[list[int]] = [[] for _ in limit]
        for _ in range(self.rounds):
            active = [len(ids) < most for ids, most in zip(done, limit, strict=True)]
            if not any(active):
                break
            base = ops.lengths
            new = self.blocks.fill(ops, active)
            ops.append(new)
            rows = [len(ids) + 1 if on else 0 for ids, on in zip(new, active, strict=True)]
            best = ops.draft_logits(rows).argmax(-1).tolist()
            for row, (ids, want, on) in enumerate(zip(new, best, active, strict=True)):
                if on:
                    kept = next((i for i, t in enumerate(ids) if t != want[i]), len(ids))
                    done[row] += [*ids[:kept], want[kept]]
                    new[row] = [*ids[:kept], want[kept]]
            ops.rewind(base)
            ops.append(new)
        return Draft(done)


@attrs.frozen
class Recorded:
    """Another drafter, whose drafts (cut to the limit) are kept; a tuple of ids for each row."""

    drafter: Drafter
    drafts: list[list[list[int]]] = attrs.field(factory=list)

    def draft(
        self, ops: DecodeOps, limit: Sequence[int], sampling: Sampling, draws: Draws
    ) -> Draft:
        """What the inner drafter drafts."""
        draft = self.drafter.draft(ops, limit, sampling, draws).cut(limit)
        self.drafts.append([list(ids) for ids in draft.ids])
        return draft
