"""What the contracts of samplers, drafters, verifications and rules try them on."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from blt_core.decoding.engine import Progress
from blt_core.model import Model
from blt_core.protocols import Sampler
from blt_core.testing.contracts import Broken, require
from blt_core.testing.reference import row_logits, true_flags
from blt_core.testing.subject import Plain, Subject, outputs, run
from blt_core.types import Sampling

GREEDY = Sampling()
WARM = Sampling(1.0)
#: Narrow enough for all outcomes of a few bytes to be summed up.
NARROW = Sampling(1.0, top_k=3)

ALPHABET = b"ab 1(\n\xe9\x00"
prompt = st.lists(st.sampled_from(ALPHABET), max_size=14).map(bytes)
prompts = st.lists(prompt, min_size=2, max_size=3)
#: Text that repeats itself, on which look-ups find something.
repeating = st.sampled_from([b"ab ab ab a", b"(a1)(a1)(a", b"\x00\x00\x00\x00"])
mixed = st.lists(st.one_of(prompt, repeating), min_size=2, max_size=3)
seeds = st.integers(0, 1000)


def verified(subject: Subject, **nested: Mapping[str, Any]) -> Sampler:
    """``speculative`` with these components nested in it."""
    sampler: Sampler = subject.built("sampler", {"use": "speculative", **nested})
    return sampler


def same_as_ar(
    model: Model, sampler: Sampler, given: list[bytes], sampling: Sampling, seed: int
) -> list[Progress]:
    """Broken unless a sampler gives ``ar``'s ids, for a batch; gives what it did."""
    own_seeds = [seed + index for index in range(len(given))]
    want = outputs(model, Plain(), given, sampling, seeds=own_seeds)
    done = run(model, sampler, given, sampling, seeds=own_seeds)
    for row, (record, theirs) in enumerate(zip(done, want, strict=True)):
        mine = record.ids
        at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
        if mine != theirs:
            place = f"byte {at}" if at is not None else "the length"
            raise Broken(
                f"batch row {row} at temperature {sampling.temperature}: {place} differs from ar's"
            )
    return done


#: Bytes of the texts whose law is summed up, and how many of them are drawn.
LAW_BYTES = 3
LAW_DRAWS = 2000
#: A fair sampler exceeds this once in 10^9 times.
LAW_SIGMAS = 6.1


def in_law(model: Model, sampler: Sampler) -> None:
    """Broken unless a sampler's texts have ``ar``'s joint law, over LAW_BYTES bytes.

    The law is summed up exactly from the model's logits; the texts are counted in LAW_DRAWS draws
    with fixed seeds, and each text's count held to what it may be.
    """
    given = b"ab 1"
    want = _law(model, given, NARROW, LAW_BYTES)
    counts: Counter[tuple[int, ...]] = Counter()
    for begin in range(0, LAW_DRAWS, 500):
        from blt_core.decoding.engine import Request, decode

        requests = [Request(given, LAW_BYTES + 2, (), begin + i) for i in range(500)]
        progress: Sequence[Any] = ()
        for step in decode(model, sampler, requests, NARROW):
            progress = step.progress
            if all(each.stop_reason or len(each.ids) >= LAW_BYTES for each in progress):
                break  # what comes after the bytes of the law is not looked at
        counts.update(_start(record) for record in progress)
    for ids in {*counts, *want}:
        expected = want.get(ids, 0.0) * LAW_DRAWS
        spread = math.sqrt(expected * (1 - expected / LAW_DRAWS)) + 1
        if abs(counts[ids] - expected) > LAW_SIGMAS * spread:
            raise Broken(
                f"of {LAW_DRAWS} texts {counts[ids]} begin with {list(ids)}; "
                f"the model's own law has {expected:.1f}"
            )


def _start(record: Any) -> tuple[int, ...]:
    """The ids of a text's law: those of its first bytes, or up to its end."""
    ids: tuple[int, ...] = record.ids[:LAW_BYTES]
    return ids if len(ids) == LAW_BYTES else (*ids, -1)


def _law(model: Model, given: bytes, sampling: Sampling, size: int) -> dict[tuple[int, ...], float]:
    """The probability of each beginning of ``size`` ids; -1 stands for EOS."""
    scheme = model.scheme
    start = [scheme.bos, *scheme.encode(given)]
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(size):
        longer: dict[tuple[int, ...], float] = {}
        for ids, mass in found.items():
            if ids[-1:] == (-1,):
                longer[ids] = longer.get(ids, 0.0) + mass
                continue
            text = [*start, *ids]
            logits = row_logits(model, text, true_flags(model, text))[-1:].clone()
            logits[:, list(scheme.never_output)] = float("-inf")
            probs = sampling.probabilities(logits)[0]
            for token in probs.nonzero()[:, 0].tolist():
                key = (*ids, -1 if token == scheme.eos else token)
                longer[key] = longer.get(key, 0.0) + mass * float(probs[token])
        found = longer
    return found


def alone_as_together(
    model: Model, make: Callable[[], Sampler], given: list[bytes], sampling: Sampling
) -> None:
    """Broken unless each prompt of a batch gives what it gives alone."""
    numbers = list(range(len(given)))
    together = run(model, make(), given, sampling, seeds=numbers)
    from blt_core.decoding.engine import decode
    from blt_core.testing.subject import requests_of

    for row, request in enumerate(requests_of(given, seeds=numbers)):
        progress: Sequence[Any] = ()
        for step in decode(model, make(), [request], sampling):
            progress = step.progress
        other = _difference(progress[0], together[row])
        require(not other, f"batch row {row} gets other {other} than the same prompt alone")


def _difference(one: Progress, other: Progress) -> str:
    """What two runs of a request differ in; empty if both gave and counted the same."""
    if one.ids != other.ids:
        return "bytes"
    pairs = {
        "drafted ids": (one.drafted, other.drafted),
        "accepted ids": (one.accepted, other.accepted),
        "rounds": (one.counts, other.counts),
        "passes": (one.passes, other.passes),
    }
    return next((f"{what} ({a} and {b})" for what, (a, b) in pairs.items() if a != b), "")


def in_turn(model: Model, sampler: Sampler, given: list[bytes], sampling: Sampling) -> None:
    """Broken unless generations whose rounds take turns give what they give one after another."""
    from blt_core.decoding.engine import decode
    from blt_core.testing.subject import requests_of

    want = [run(model, sampler, [each], sampling)[0] for each in given]
    runs = [decode(model, sampler, requests_of([each]), sampling) for each in given]
    last: list[Any] = [None] * len(given)
    for steps in itertools.zip_longest(*runs):
        last = [
            step.progress[0] if step else before for step, before in zip(steps, last, strict=True)
        ]
    for row, record in enumerate(last):
        other = _difference(record, want[row])
        require(
            not other,
            f"what a text gets depends on another one that is generated at the same time: {other}",
        )


def same_each_time(
    model: Model, make: Callable[[], Sampler], given: list[bytes], sampling: Sampling
) -> None:
    """Broken unless a batch gives the same in any global random state."""
    from blt_core.testing.contracts import reseed

    found = []
    for number in range(2):
        reseed(number)
        found.append(outputs(model, make(), given, sampling, seeds=list(range(len(given)))))
    require(found[0] == found[1], "gives other bytes in another global random state")
