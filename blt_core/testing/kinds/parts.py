"""What the parts of a model promise: patchers, byte scorers, encoders, global models, decoders.

All of them read texts piece by piece with a cache, and must give what they give for whole texts
without one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from blt_core.storage.unlisted import unlisted
from blt_core.testing import programs
from blt_core.testing.contracts import Broken, Contracts, NotPromised, require, reseed
from blt_core.testing.sequences import (
    TOLERANCE,
    DecoderRows,
    Driven,
    driven,
    far,
    first_difference,
    whole,
)
from blt_core.testing.subject import Subject
from blt_core.types import Patches, Rows

#: Words, signs, spaces, NUL and bytes beyond ASCII: what opens a patch in one way or another.
ALPHABET = b"ab 1(\n\xe9\x00"
BOS = 256

bytes_ = st.lists(st.sampled_from(ALPHABET), max_size=5)
text = st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=30).map(lambda t: [BOS, *t])
texts = st.lists(text, min_size=2, max_size=3)


def _pairs(each: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(each, min_size=2, max_size=2)


def _steps(*kinds: str) -> st.SearchStrategy[list[tuple[str, list[Any]]]]:
    """What is done with a cache of two texts: read bytes, rewind by a number, settle."""
    each = {
        "read": _pairs(bytes_),
        "rewind": _pairs(st.integers(0, 6)),
        "settle": _pairs(st.integers(0, 12)),
    }
    step = st.one_of(*(st.tuples(st.just(kind), each[kind]) for kind in kinds))
    # Long enough for windows and rings to turn.
    first = st.tuples(st.just("read"), _pairs(st.lists(st.sampled_from(ALPHABET), max_size=20)))
    return st.tuples(first, st.lists(step, min_size=1, max_size=8)).map(lambda t: [t[0], *t[1]])


def _part(subject: Subject) -> Driven:
    return driven(subject.kind, subject.model)


def _shape(subject: Subject, example: list[list[int]]) -> None:
    part = _part(subject)
    part.read(example, [0] * len(example), None)
    part.read(example, [0] * len(example), part.new_cache(len(example)))


def _lengths(subject: Subject, example: list[tuple[str, list[Any]]]) -> None:
    _follow(subject, example, compare=False)


def _deterministic(subject: Subject, example: list[int]) -> None:
    part, found = _part(subject), []
    for number in range(3):
        reseed(number)
        found.append(whole(part, example))
    require(
        all(far(found[0], other) == 0 for other in found),
        "gives something else in another global random state",
    )


def _arguments(subject: Subject, example: list[int]) -> None:
    whole(_part(subject), example)  # the drivers look at what they gave


def _causal(subject: Subject, example: tuple[list[int], int, int]) -> None:
    ids, place, change = example
    place = 1 + place % (len(ids) - 1)
    other = list(ids)
    other[place] = (other[place] + 1 + change) % 256
    part = _part(subject)
    one, two = whole(part, ids), whole(part, other)
    at = first_difference(one, two)
    require(
        at is None or at >= place,
        f"row {at} depends on byte {place}, which comes after it",
    )


def _batch(subject: Subject, example: list[list[int]]) -> None:
    part = _part(subject)
    together = part.read(example, [0] * len(example), None)
    for row, (ids, found) in enumerate(zip(example, together, strict=True)):
        require(
            far(found, whole(part, ids)) <= TOLERANCE,
            f"batch row {row} differs from the same text alone",
        )


def _stateless(subject: Subject, example: list[list[int]]) -> None:
    """Two generations at a time, byte by byte in turn, as two requests of a server."""
    part = _part(subject)
    alone = [_byte_by_byte(part, [ids])[0] for ids in example]
    for found, want in zip(_byte_by_byte(part, example), alone, strict=True):
        require(
            far(found, want) <= TOLERANCE,
            "what it gives for a text depends on another text that is read at the same time",
        )


def _byte_by_byte(part: Driven, given: list[list[int]]) -> list[Tensor]:
    """What a part gives for texts that are read a byte at a time, in turn, each with its cache."""
    caches = [part.new_cache(1) for _ in given]
    found: list[list[Tensor]] = [[] for _ in given]
    for place in range(max(map(len, given))):
        for each, ids in enumerate(given):
            if place < len(ids):
                found[each] += part.read([ids[: place + 1]], [place], caches[each])
    return [torch.cat(each) for each in found]


class _Held:
    """A cache of two texts, held to what the part gives for the whole texts."""

    def __init__(self, subject: Subject, *, compare: bool) -> None:
        self.kind, self.part, self.compare = subject.kind, _part(subject), compare
        self.cache = self.part.new_cache(2)
        self.texts, self.settled = [[BOS], [BOS]], [0, 0]
        self.part.read(self.texts, [0, 0], self.cache)

    def read(self, new: list[list[int]]) -> None:
        """Read more bytes of each text."""
        if not any(new):
            return
        before = [len(ids) for ids in self.texts]
        self.texts = [[*ids, *more] for ids, more in zip(self.texts, new, strict=True)]
        found = self.part.read(self.texts, before, self.cache)
        if self.compare:
            for row, (ids, n) in enumerate(zip(self.texts, before, strict=True)):
                self._hold(row, found[row], ids, n)

    def _hold(self, row: int, found: Tensor, ids: list[int], begin: int) -> None:
        at = first_difference(found, whole(self.part, ids)[begin:]) if len(ids) > begin else None
        if at is not None:
            raise Broken(
                f"batch row {row}, byte {begin + at}: with a cache it gives something else than "
                "for the whole text"
            )

    def rewind(self, numbers: list[int]) -> None:
        """Cut so many bytes off each text, not below what is settled."""
        cut = zip(self.texts, numbers, self.settled, strict=True)
        self.texts = [ids[: max(len(ids) - by, kept, 1)] for ids, by, kept in cut]
        for each, count in self.part.caches(self.cache):
            each.rewind([count(ids) for ids in self.texts])

    def settle(self, numbers: list[int]) -> None:
        """Promise not to cut below so many bytes of each text."""
        asked = zip(self.texts, numbers, self.settled, strict=True)
        self.settled = [max(min(n, len(ids)), kept) for ids, n, kept in asked]
        for each, count in self.part.caches(self.cache):
            held = zip(self.texts, self.settled, strict=True)
            each.settle([count(ids[:n]) for ids, n in held])

    def check_lengths(self) -> None:
        """Broken unless each cache tells what it holds."""
        for each, count in self.part.caches(self.cache):
            want = [count(ids) for ids in self.texts]
            if [*each.lengths] != want:
                text = f"its cache has lengths {[*each.lengths]} where it holds {want}"
                raise Broken(text, f"{self.kind}.lengths")


def _follow(
    subject: Subject, steps: Sequence[tuple[str, list[Any]]], *, compare: bool = True
) -> None:
    """Do ``steps`` with a cache of two texts, and hold each result to that of the whole text."""
    held = _Held(subject, compare=compare)
    for kind, numbers in steps:
        getattr(held, kind)(numbers)
        held.check_lengths()


def _incremental(subject: Subject, example: list[tuple[str, list[Any]]]) -> None:
    _follow(subject, example)


#: Rows of a long text: more than a window usually has.
LONG = 600


def _windows(subject: Subject, _: None) -> None:
    """Long texts: rewound to what is settled, far back and near, and gone on from there."""
    held, rng = _Held(subject, compare=True), Random(5)

    def more(*counts: int) -> None:
        held.read([[ALPHABET[rng.randrange(len(ALPHABET))] for _ in range(n)] for n in counts])
        held.check_lengths()

    more(LONG, LONG // 3)
    held.settle([LONG // 2, LONG // 6])
    held.rewind([3, 2])
    more(2, 1)
    held.rewind([LONG, LONG])  # to what is settled, exactly
    held.check_lengths()
    more(1, 5)
    more(LONG // 2, 70)
    held.rewind([150, 40])
    more(7, 9)
    held.settle([len(ids) for ids in held.texts])
    more(9, 4)
    held.rewind([9, 4])
    more(3, 3)


def _saved(subject: Subject, _: None) -> None:
    lost = unlisted(subject.model).weights
    require(not lost, f"its state_dict does not list {', '.join(sorted(lost))}")
    one = driven(subject.kind, subject.model)
    reseed(12345)
    other = driven(subject.kind, subject.rebuilt())
    ids = [BOS, *b"ab 1(ab\n\xe9 ab 1(ab\n\xe9"]
    apart = far(whole(one, ids), whole(other, ids))
    require(apart <= TOLERANCE, "gives something else after it was stored and loaded")


def _engine(subject: Subject, example: Any) -> None:
    programs.follow(subject.model, example)


def _common(contracts: Contracts, rows: str) -> None:
    """The contracts that all parts have, in the order in which they are tried."""
    add: Callable[..., Any] = contracts.add
    add("shape", f"gives {rows}, with and without a cache.", lambda _: texts)(_shape)
    add(
        "deterministic",
        "What it gives depends on its input and weights alone, on no global random state.",
        lambda _: text,
    )(_deterministic)
    add("arguments", "It does not write to what it is given.", lambda _: text)(_arguments)
    add(
        "causal",
        "A row depends on no byte (or patch) after its own.",
        lambda _: st.tuples(text, st.integers(0, 40), st.integers(0, 200)),
    )(_causal)
    add(
        "batch",
        "A text gives the same in a ragged batch as alone: padding is never read.",
        lambda _: texts,
    )(_batch)
    add(
        "lengths",
        "A cache's `lengths` count the rows that it holds, after a pass, a rewind and a settle.",
        lambda _: _steps("read", "rewind", "settle"),
    )(_lengths)
    add(
        "stateless",
        "Nothing is kept between calls but in caches: texts that are read in turn do not mix.",
        lambda _: _pairs(text),
        share=0.5,
    )(_stateless)
    add(
        "incremental",
        "Read in pieces with a cache, a text gives what it gives as a whole without one.",
        lambda _: _steps("read"),
    )(_incremental)
    add(
        "rewind",
        "After a rewind the cache is what it would be had the bytes after it never been read.",
        lambda _: _steps("read", "rewind"),
    )(_incremental)
    add(
        "settle",
        "A settle changes nothing that is given afterwards.",
        lambda _: _steps("read", "rewind", "settle"),
    )(_incremental)
    add(
        "windows",
        f"So it is after {LONG} rows too: what lies behind a window is dropped once it is settled.",
    )(_windows)
    add(
        "saved",
        "Its `state_dict` lists all that it needs: stored and loaded, it gives the same.",
    )(_saved)


def _last(contracts: Contracts) -> None:
    contracts.add(
        "engine",
        "In the decode engine, whatever is appended, drafted, denoised, rewound and settled, "
        "logits are those of whole texts without caches.",
        lambda subject: programs.programs(denoises=programs.denoises(subject.model)),
    )(_engine)


PATCHER = Contracts("patcher")
_common(PATCHER, "bool flags (b, r), one for each new byte")


@PATCHER.add(
    "first-flag",
    "The flag of byte 0 is set: BOS is a patch of its own.",
    lambda _: text,
    idle="it opened no patch after byte 0 in any example",
)
def _first_flag(subject: Subject, example: list[int]) -> None:
    flags = whole(_part(subject), example)
    require(bool(flags[0]), "flag 1, that of byte 0, is not set")
    if bool(flags[1:].any()):
        subject.exercised()


_last(PATCHER)

BYTE_SCORER = Contracts("byte_scorer")
_common(BYTE_SCORER, "logits (b, r, V)")
_last(BYTE_SCORER)

ENCODER = Contracts("encoder")
_common(ENCODER, "byte states (b, r, D)")


def _patches(example: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
    """Starts and sizes of patches that cover a text."""
    ids, cuts = example
    starts = sorted({0, *(cut % len(ids) for cut in cuts)})
    return starts, [b - a for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def _embedded(subject: Subject, states: Tensor, starts: list[int], sizes: list[int]) -> Tensor:
    given = Patches(torch.tensor([starts]), torch.tensor([sizes]), (len(starts),))
    found = subject.model.encoder.patch_embeddings(states, given)
    require(
        isinstance(found, Tensor) and tuple(found.shape[:2]) == (1, len(starts)),
        f"patch_embeddings gave {getattr(found, 'shape', found)!r} for {len(starts)} patches",
    )
    return found[0]


cut_texts = st.tuples(text, st.lists(st.integers(0, 40), max_size=6))


@ENCODER.add(
    "own-bytes",
    "A patch's embedding depends on the states of its own bytes alone.",
    lambda _: cut_texts,
)
def _own_bytes(subject: Subject, example: tuple[list[int], list[int]]) -> None:
    ids, (starts, sizes) = example[0], _patches(example)
    rows = Rows(torch.tensor([ids]), (len(ids),))
    states = subject.model.encoder.byte_states(rows, None)
    found = _embedded(subject, states, starts, sizes)
    for place, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        other = torch.full_like(states, 3.0)
        other[0, start : start + size] = states[0, start : start + size]
        alone = _embedded(subject, other, starts, sizes)[place]
        require(
            far(found[place], alone) <= TOLERANCE,
            f"the embedding of patch {place} depends on states of bytes outside of it",
        )


@ENCODER.add(
    "patch-batch",
    "Patches are embedded alike in a ragged batch and alone; patches of size 0 are padding.",
    lambda _: st.lists(cut_texts, min_size=2, max_size=2),
)
def _patch_batch(subject: Subject, example: list[tuple[list[int], list[int]]]) -> None:
    encoder = subject.model.encoder
    cuts, longest = [_patches(each) for each in example], max(len(ids) for ids, _ in example)
    most = max(len(starts) for starts, _ in cuts)
    ids = torch.tensor([[*ids, *[77] * (longest - len(ids))] for ids, _ in example])
    states = encoder.byte_states(Rows(ids, tuple(len(ids) for ids, _ in example)), None)
    given = Patches(
        torch.tensor([[*s, *[0] * (most - len(s))] for s, _ in cuts]),
        torch.tensor([[*z, *[0] * (most - len(z))] for _, z in cuts]),
        tuple(len(s) for s, _ in cuts),
    )
    found = encoder.patch_embeddings(states, given)
    for row, (starts, sizes) in enumerate(cuts):
        alone = _embedded(subject, states[row : row + 1], starts, sizes)
        require(
            far(found[row, : len(starts)], alone) <= TOLERANCE,
            f"the patches of batch row {row} are embedded otherwise than alone",
        )


_last(ENCODER)

GLOBAL_MODEL = Contracts("global_model")
_common(GLOBAL_MODEL, "latents (b, m, D), one for each new patch")
_last(GLOBAL_MODEL)

DECODER = Contracts("decoder")
_common(DECODER, "logits (b, r, V) of its clean rows")

_blocks = st.tuples(text, st.lists(st.sampled_from((97, 32, 258)), min_size=1, max_size=5))


def _decoder(subject: Subject) -> DecoderRows:
    part = _part(subject)
    if not isinstance(part, DecoderRows) or not subject.model.decoder.denoises:
        raise NotPromised("it does not denoise")
    return part


@DECODER.add(
    "blocks",
    "Blocks change no clean row; the rows of a block see the clean rows before it and all of the "
    "block, those of a causal block nothing after themselves.",
    lambda _: st.tuples(_blocks, st.integers(0, 4)),
)
def _block_rows(subject: Subject, example: tuple[tuple[list[int], list[int]], int]) -> None:
    (ids, block), place = example
    part = _decoder(subject)
    place %= len(block)
    other = list(block)
    other[place] = 98
    _, clean = part.blocks(ids, block)
    require(far(clean, whole(part, ids)) <= TOLERANCE, "a clean row sees a block")
    at = first_difference(
        part.blocks(ids, block, causal=True)[0], part.blocks(ids, other, causal=True)[0]
    )
    require(at is None or at >= place, f"row {at} of a causal block sees row {place}")


@DECODER.add(
    "blocks-forgotten",
    "A block gives the same after a cache as after the whole text, and is never remembered.",
    lambda _: _blocks,
)
def _blocks_forgotten(subject: Subject, example: tuple[list[int], list[int]]) -> None:
    ids, block = example
    part = _decoder(subject)
    cache = part.new_cache(1)
    part.read([ids[:-1]], [0], cache)
    if len(ids) > 1:
        part.read([ids], [len(ids) - 1], cache)
    want, _ = part.blocks(ids, block)
    for _ in range(2):
        found = part.block_from_cache(cache, ids, block)
        require(far(found, want) <= TOLERANCE, "a block gives something else with a cache")
    longer = [*ids, 98]
    found = part.read([longer], [len(ids)], cache)[0]
    require(
        far(found, whole(part, longer)[len(ids) :]) <= TOLERANCE,
        "a block is remembered: the rows after it differ",
    )


_last(DECODER)
