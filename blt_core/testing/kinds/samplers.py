"""What samplers promise."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from blt_core.errors import EngineError, RequestError
from blt_core.protocols import Sampler
from blt_core.testing.contracts import Broken, Contracts, NotPromised, require
from blt_core.testing.kinds.texts import (
    GREEDY,
    WARM,
    alone_as_together,
    in_law,
    in_turn,
    mixed,
    same_as_ar,
    same_each_time,
    seeds,
)
from blt_core.testing.subject import Subject, outputs, run
from blt_core.types import Sampling

SAMPLER = Contracts("sampler")

#: A batch that has most of what there is: no prompt, words, and text that repeats itself.
PROMPTS = [b"ab 1(ab\n", b"", b"ab ab ab a"]


def _sampler(subject: Subject) -> Sampler:
    """The sampler, built anew beside the host model."""
    sampler: Sampler = subject.built("sampler", subject.own_table)
    return sampler


def _served(sampler: Sampler) -> list[Sampling]:
    """What it serves, of a greedy and a random setting."""
    served = []
    for sampling in (GREEDY, WARM):
        try:
            sampler.check(sampling)
        except RequestError:
            continue
        served.append(sampling)
    return served


@SAMPLER.add(
    "check",
    "`check` gives nothing; it refuses a setting by RequestError, and serves at least one.",
)
def _check(subject: Subject, _: None) -> None:
    sampler, served = _sampler(subject), 0
    for sampling in (GREEDY, WARM, Sampling(0.5, top_k=3), Sampling(2.0, top_p=0.5)):
        try:
            found: Any = sampler.check(sampling)  # type: ignore[func-returns-value]
        except RequestError:
            continue
        require(found is None, f"check gave {found!r}; it refuses a setting by RequestError")
        served += 1
    require(served, "check refuses every setting")


@SAMPLER.add("keeps-text", "What earlier rounds committed stays: users have read it.")
def _keeps(subject: Subject, _: None) -> None:
    sampler = _sampler(subject)
    for sampling in _served(sampler):
        try:
            run(subject.model, sampler, [PROMPTS[0], PROMPTS[2]], sampling)
        except EngineError as error:  # noqa: PERF203
            if error.contract == "sampler.keeps-text" or "settled" in error.text:
                raise Broken(error.text) from error
        except Exception:  # noqa: BLE001, S112 -- the contract that it breaks comes later
            continue


@SAMPLER.add(
    "runs",
    "Every prompt is continued, whatever it is, alone and in batches, to its length or EOS.",
    lambda _: mixed,
    share=0.5,
)
def _runs(subject: Subject, example: list[bytes]) -> None:
    sampler = _sampler(subject)
    for sampling in _served(sampler):
        run(subject.model, sampler, example, sampling)


@SAMPLER.add(
    "commits",
    "A round appends at least one id to each unfinished text, all of them such as may be output, "
    "and reports exactly these.",
)
def _commits(subject: Subject, _: None) -> None:
    _runs(subject, PROMPTS)  # the engine looks at each round


@SAMPLER.add(
    "counts",
    "A round's counts are whole numbers, 0 <= accepted <= drafted; `prefill` is true of a first "
    "round alone.",
    idle="no round drafted anything",
)
def _counts(subject: Subject, _: None) -> None:
    sampler = _sampler(subject)
    for sampling in _served(sampler):
        if any(record.drafted for record in run(subject.model, sampler, PROMPTS, sampling)):
            subject.exercised()


@SAMPLER.add(
    "deterministic",
    "The same request gives the same bytes in any global random state.",
    lambda _: mixed,
    share=0.3,
)
def _deterministic(subject: Subject, example: list[bytes]) -> None:
    for sampling in _served(_sampler(subject)):
        same_each_time(subject.model, lambda: _sampler(subject), example, sampling)


@SAMPLER.add(
    "batch",
    "A prompt gives the same bytes in a batch as alone, and as many drafted and accepted ids, "
    "rounds and passes.",
    lambda _: mixed,
    share=0.3,
)
def _batch(subject: Subject, example: list[bytes]) -> None:
    for sampling in _served(_sampler(subject)):
        alone_as_together(subject.model, lambda: _sampler(subject), example, sampling)


@SAMPLER.add(
    "stateless",
    "Nothing is kept between calls but in attached caches: generations that take turns do not mix, "
    "in their bytes or their counts.",
    lambda _: mixed,
    share=0.3,
)
def _stateless(subject: Subject, example: list[bytes]) -> None:
    sampler = _sampler(subject)
    for sampling in _served(sampler):
        in_turn(subject.model, sampler, example, sampling)


@SAMPLER.add(
    "temperature",
    "At temperature 0 the seed changes nothing; at a high one it changes the bytes.",
)
def _temperature(subject: Subject, _: None) -> None:
    sampler, given = _sampler(subject), [b"ab 1(", b""]
    served = _served(sampler)
    if GREEDY in served:
        one, two = (outputs(subject.model, sampler, given, GREEDY, seeds=[n, n]) for n in (1, 2))
        require(one == two, "at temperature 0 its bytes depend on the seed")
    hot = Sampling(3.0)
    try:
        sampler.check(hot)
    except RequestError:
        return
    found = {tuple(outputs(subject.model, sampler, given, hot, seeds=[n, n])[0]) for n in range(4)}
    require(len(found) > 1, "at temperature 3 four seeds give one text: it is not looked at")


@SAMPLER.add(
    "true-logits",
    "With `true_logits`, the last next_logits of a round predicted all that it commits.",
    lambda _: mixed,
    share=0.3,
)
def _true_logits(subject: Subject, example: list[bytes]) -> None:
    sampler = _sampler(subject)
    if not getattr(sampler, "true_logits", False):
        raise NotPromised("it does not say true_logits")
    for record in run(subject.model, sampler, example, GREEDY, logprobs=0):
        found = record.likelihoods
        require(found is not None and len(found) == len(record.ids), "told too few likelihoods")


@SAMPLER.add(
    "identical",
    "With `true_logits` and without `in_law`, its bytes are `ar`'s, seed for seed.",
    lambda _: st.tuples(mixed, seeds),
    share=0.5,
)
def _identical(subject: Subject, example: tuple[list[bytes], int]) -> None:
    sampler = _sampler(subject)
    if not getattr(sampler, "true_logits", False):
        raise NotPromised("it does not say true_logits")
    served = _served(sampler)
    if getattr(sampler, "in_law", False):
        served = [sampling for sampling in served if sampling.greedy]
    for sampling in served:
        same_as_ar(subject.model, sampler, example[0], sampling, example[1])


@SAMPLER.add("law", "With `in_law`, its texts have the model's own joint law.")
def _law(subject: Subject, _: None) -> None:
    sampler = _sampler(subject)
    if not getattr(sampler, "in_law", False):
        raise NotPromised("it does not say in_law")
    if WARM not in _served(sampler):
        raise Broken("it says in_law, and serves temperature 0 only")
    in_law(subject.model, sampler)
