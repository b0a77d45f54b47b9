"""What unmasking rules promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor

from blt_core.decoding.denoising import select
from blt_core.protocols import Unmasking
from blt_core.testing.contracts import Broken, Contracts, NotPromised, require, reseed
from blt_core.testing.kinds.texts import GREEDY, WARM, mixed, same_as_ar
from blt_core.testing.subject import Subject, run
from blt_core.types import FREE_STREAM, Draws

UNMASKING = Contracts("unmasking")

#: Ids of the distributions that rules are asked about directly.
SIZE = 5
#: Which of a block's bytes are masked, and the seed and the sharpness of the distributions.
blocks = st.tuples(
    st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=2, max_size=3),
    st.integers(0, 1000),
    st.sampled_from((0.1, 1.0, 6.0)),
)


def _question(example: Any) -> tuple[Tensor, Tensor, list[int], Draws]:
    """(probabilities, masked places, starts, draws) of an example; some place is masked."""
    rows, seed, sharp = example
    masked = torch.tensor(rows)
    if not bool(masked.any()):
        masked[0, 2] = True
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*masked.shape, SIZE, generator=generator, dtype=torch.float64)
    starts = [4 + 5 * index for index in range(len(rows))]
    draws = Draws(tuple(range(seed, seed + len(rows))))
    return (sharp * logits).softmax(-1), masked, starts, draws


def _select(rule: Unmasking, example: Any) -> Tensor:
    return select(rule, *_question(example))


@UNMASKING.add(
    "places",
    "It gives a bool tensor (b, B), true for at least one masked byte of each row that has any.",
    lambda _: blocks,
)
def _places(subject: Subject, example: Any) -> None:
    _select(subject.build(), example)


@UNMASKING.add(
    "arguments",
    "It does not write to the probabilities that it is given.",
    lambda _: blocks,
)
def _arguments(subject: Subject, example: Any) -> None:
    probs, masked, starts, draws = _question(example)
    before = probs.clone()
    select(subject.build(), probs, masked, starts, draws)
    require(torch.equal(before, probs), "wrote to the probabilities that it was given")


@UNMASKING.add(
    "deterministic",
    "It selects the same in any global random state: chance comes from `draws`.",
    lambda _: blocks,
)
def _deterministic(subject: Subject, example: Any) -> None:
    found = []
    for number in range(3):
        reseed(number)
        found.append(_select(subject.build(), example))
    require(
        all(torch.equal(found[0], other) for other in found),
        "selects other places in another global random state",
    )


@UNMASKING.add(
    "batch",
    "What it selects in a block does not depend on the others of the batch.",
    lambda _: blocks,
)
def _batch(subject: Subject, example: Any) -> None:
    together = _select(subject.build(), example)
    probs, masked, starts, draws = _question(example)
    for row in range(len(masked)):
        if not bool(masked[row].any()):
            continue
        one = slice(row, row + 1)
        own_draws = Draws((draws.seeds[row],))
        alone = select(subject.build(), probs[one], masked[one], starts[one], own_draws)
        require(
            torch.equal(alone[0], together[row]),
            f"selects other places in batch row {row} than in the same block alone",
        )


@attrs.frozen
class _Recorded(Draws):
    """Draws that keep which numbers were asked for: (batch row, position, stream) of each."""

    asked: list[tuple[int, int, int]] = attrs.field(factory=list, eq=False)

    def of_round(self, begins: Sequence[int]) -> Draws:
        """Those of a round, kept in the same list."""
        return _Recorded(self.seeds, tuple(begins), self.asked)

    def uniform(self, row: int, position: int, stream: int = 0) -> float:
        """As without the list."""
        self.asked.append((row, position, stream))
        return Draws.uniform(self, row, position, stream)

    def noise_at(self, places: Sequence[tuple[int, int]], size: int, stream: int = 0) -> Tensor:
        """As without the list."""
        self.asked.extend((row, position, stream) for row, position in places)
        return Draws.noise_at(self, places, size, stream)


@UNMASKING.add(
    "draws",
    "What it draws, it draws at the positions of the block's bytes, on a stream from FREE_STREAM "
    "on: other blocks and other draws are independent of it.",
    lambda _: blocks,
    idle="it drew nothing in any example",
)
def _draws(subject: Subject, example: Any) -> None:
    probs, masked, starts, draws = _question(example)
    # Far into a text, where a place in the block is no position of its bytes.
    starts = [1000 + 7 * start for start in starts]
    recorded = _Recorded(draws.seeds)
    select(subject.build(), probs, masked, starts, recorded)
    size = masked.shape[1]
    for row, position, stream in recorded.asked:
        subject.exercised()
        begin = starts[row]
        if not begin <= position < begin + size:
            raise Broken(
                f"draws at position {position} for batch row {row}, whose block has the bytes "
                f"{begin} to {begin + size - 1}"
            )
        if stream < FREE_STREAM:
            raise Broken(f"draws on stream {stream}; those below {FREE_STREAM} are the package's")


@UNMASKING.add(
    "stateless",
    "Nothing is kept between calls: what it selects does not depend on what it was asked before.",
    lambda _: st.lists(blocks, min_size=2, max_size=3),
)
def _stateless(subject: Subject, example: list[Any]) -> None:
    rule = subject.build()
    found = [_select(rule, each) for each in example]
    again = [_select(rule, each) for each in example[::-1]][::-1]
    require(
        all(torch.equal(a, b) for a, b in zip(found, again, strict=True)),
        "selects other places after other questions",
    )


@UNMASKING.add(
    "in-order",
    "With the ability `in_order`, no byte is filled later than one on its right.",
    lambda _: blocks,
)
def _in_order(subject: Subject, example: Any) -> None:
    if not subject.can("in_order"):
        raise NotPromised("it does not say in_order")
    rule = subject.build()
    probs, masked, starts, draws = _question(example)
    left = masked.clone()
    while bool(left.any()):
        chosen = select(rule, probs, left, starts, draws)
        for row in range(len(left)):
            places = left[row].nonzero()[:, 0].tolist()
            filled = chosen[row].nonzero()[:, 0].tolist()
            if filled != places[: len(filled)]:
                raise Broken(f"fills places {filled} of row {row} where {places} are masked")
        left &= ~chosen


@UNMASKING.add(
    "fills",
    "In `blt-d` it fills every block; as the drafter of `blt-dv` it leaves `ar`'s bytes.",
    lambda _: mixed,
    share=0.5,
)
def _fills(subject: Subject, example: list[bytes]) -> None:
    keys = {"block_bytes": 4, "unmasking": subject.own_table}
    for sampling in (GREEDY, WARM):
        run(subject.model, subject.built("sampler", {"use": "blt-d", **keys}), example, sampling)
        sampler = subject.built("sampler", {"use": "blt-dv", **keys})
        same_as_ar(subject.model, sampler, example, sampling, 1)
