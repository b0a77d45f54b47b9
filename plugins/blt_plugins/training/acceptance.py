"""How much of a draft stands on held-out text, where no text of the model's own flatters it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import attrs

from blt_core.errors import DataError
from blt_core.pipeline import Pipeline

#: A round that drafts more bytes than this is cut off.
MOST_BYTES = 64


@attrs.frozen
class Acceptance:
    """One round after each of many prefixes of held-out text.

    by_place: share of the rounds whose draft stood up to each place, as far as any draft went.
    """

    sampler: str
    rounds: int
    drafted: int
    accepted: int
    by_place: tuple[float, ...]

    @property
    def bytes_per_round(self) -> float:
        """Mean bytes committed a round, the model's own byte included."""
        return self.accepted / self.rounds + 1


def prefixes(documents: Sequence[bytes], count: int, *, longest: int, seed: int = 0) -> list[bytes]:
    """``count`` runs of at most ``longest`` bytes that end at random places of the documents.

    Raises DataError if there is no document of two bytes.
    """
    rng = random.Random(f"{seed}/prefixes")
    usable = [text for text in documents if len(text) > 1]
    if not usable:
        raise DataError("no held-out text to draft after: the documents are empty")
    sizes = [len(text) - 1 for text in usable]
    found = []
    for text in rng.choices(usable, sizes, k=count):
        end = rng.randrange(1, len(text))
        found.append(text[max(end - longest, 0) : end])
    return found


def batched(prompts: Sequence[bytes], size: int = 16) -> list[list[bytes]]:
    """Groups of like length, since a batch computes as many rows for all."""
    ordered = sorted(prompts, key=len)
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


def acceptance(pipeline: Pipeline, sampler: str, batches: Iterable[Sequence[bytes]]) -> Acceptance:
    """Let ``sampler`` draft once after each prompt of each batch, greedily."""
    own = pipeline.with_sampler(sampler)
    outcomes: list[tuple[int, int]] = []
    for prompts in batches:
        room = min(MOST_BYTES, own.model.context_bytes - max(map(len, prompts)))
        for step in own.steps(prompts, max_new_bytes=room, temperature=0.0, stop=()):
            if all(record.rounds or record.stop_reason for record in step.progress):
                outcomes += [(r.drafted, r.accepted) for r in step.progress if r.rounds == 1]
                break
    longest = max((drafted for drafted, _ in outcomes), default=0)
    stood = [sum(accepted > place for _, accepted in outcomes) for place in range(longest)]
    return Acceptance(
        sampler,
        rounds=len(outcomes),
        drafted=sum(drafted for drafted, _ in outcomes),
        accepted=sum(accepted for _, accepted in outcomes),
        by_place=tuple(n / len(outcomes) for n in stood),
    )
