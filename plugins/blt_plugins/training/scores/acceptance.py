"""How much of a draft stands on held-out text, where no text of the model's own flatters it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from blt_core.pipeline import Pipeline

#: A round that drafts more bytes than this is cut off.
MOST_BYTES = 64
#: Drafts are judged so, whatever a config says.
GREEDY: Mapping[str, Any] = {"temperature": 0.0, "stop": ()}


@attrs.frozen
class Acceptance:
    """One round after each of many prefixes of held-out text.

    rounds: fewer than prefixes where the model ends a text at once. committed: bytes of these
    rounds, the model's own included. reached, stood: drafts that have a byte at each place, and
    those that were accepted up to it.
    """

    sampler: str
    rounds: int
    drafted: int
    accepted: int
    committed: int
    reached: tuple[int, ...]
    stood: tuple[int, ...]

    @property
    def accepted_share(self) -> float | None:
        """Share of the drafted bytes that stand; None for a sampler that drafts nothing."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def bytes_per_round(self) -> float | None:
        """Mean bytes committed a round; None without a round."""
        return self.committed / self.rounds if self.rounds else None

    @property
    def by_place(self) -> tuple[float, ...]:
        """Of the drafts that have a byte at each place, the share that stands up to it."""
        return tuple(n / of for n, of in zip(self.stood, self.reached, strict=True))


def acceptance(
    pipeline: Pipeline,
    sampler: str,
    batches: Iterable[Sequence[bytes]],
    *,
    longest: int | None = None,
) -> Acceptance:
    """Let ``sampler`` draft once after each prompt of each batch, greedily.

    longest: of all prompts, in bytes, so that each has as much room in whichever batch it is; by
    default that of its batch.
    """
    own = pipeline.with_sampler(sampler)
    rounds: list[tuple[int, int, int]] = []
    for prompts in batches:
        size = max(map(len, prompts)) if longest is None else longest
        room = min(MOST_BYTES, own.model.context_bytes - size)
        rounds += _first_rounds(own, prompts, room)
    longest = max((drafted for drafted, _, _ in rounds), default=0)
    return Acceptance(
        sampler,
        rounds=len(rounds),
        drafted=sum(drafted for drafted, _, _ in rounds),
        accepted=sum(accepted for _, accepted, _ in rounds),
        committed=sum(committed for _, _, committed in rounds),
        reached=tuple(sum(drafted > i for drafted, _, _ in rounds) for i in range(longest)),
        stood=tuple(sum(accepted > i for _, accepted, _ in rounds) for i in range(longest)),
    )


def _first_rounds(
    pipeline: Pipeline, prompts: Sequence[bytes], room: int
) -> list[tuple[int, int, int]]:
    """(drafted, accepted, committed) of the first round after each prompt that has one.

    room: bytes that may follow a prompt.
    """
    before = [0] * len(prompts)
    for step in pipeline.steps(prompts, max_new_bytes=room, **GREEDY):
        if not step.round.prefill:
            rows = zip(step.progress, before, step.round.drafted, step.round.accepted, strict=True)
            # Accepted in full: an EOS that stands is no part of the output, but of the draft.
            return [(drafted, stood, r.length - n) for r, n, drafted, stood in rows if r.rounds]
        before = [record.length for record in step.progress]
    return []
