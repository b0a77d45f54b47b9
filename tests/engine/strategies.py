"""Hypothesis strategies: prompts, requests, drafters, programs of operations."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st

from blt_core.decoding.engine import Request
from blt_core.protocols import Drafter, StoppingDrafter, Unmasking
from blt_core.types import Sampling
from blt_plugins.drafting.diffusion import DiffusionDrafter, DiffusionParams
from blt_plugins.drafting.lookup import LookupDrafter, LookupParams
from blt_plugins.drafting.model import ModelDrafter
from blt_plugins.unmasking.composed import (
    AnyOf,
    AnyOfParams,
    AtMost,
    AtMostParams,
    LeftToRight,
    LeftToRightParams,
)
from blt_plugins.unmasking.rules import (
    AllParams,
    Confidence,
    ConfidenceParams,
    EntropyBound,
    EntropyBoundParams,
    FillAll,
)
from tests.engine import models
from tests.engine.drafters import BlockSteps, Cascade, Oracle, RandomBytes
from tests.engine.runs import (
    GREEDY,
    adaptive_drafter,
    ar_alone,
    ar_ids,
    cascade_drafter,
    first_drafter,
    model_drafter,
    self_drafter,
    until_drafter,
)
from tests.nightly import EXAMPLES

C = models.CONTEXT

INVALID_UTF8 = (b"\xff\xfe", b"\xc3(", b"a\x80", b"\xe2\x82")


def examples(count: int) -> Callable[..., object]:
    """``count`` examples in the profile "nightly", and in others as many more or fewer."""
    share = settings.default.max_examples / EXAMPLES["nightly"]
    return settings(max_examples=max(round(count * share), 1))


def prompts(*, longest: int = 24) -> st.SearchStrategy[bytes]:
    """Empty, one byte, words, NUL bytes, invalid UTF-8, longer than any window."""
    return st.one_of(
        st.binary(max_size=longest),
        st.just(b""),
        st.binary(min_size=1, max_size=1),
        st.sampled_from(INVALID_UTF8),
        st.lists(st.sampled_from([b"ab ", b"word", b"\n\n", b"x1(", "é".encode()]), max_size=4).map(
            b"".join
        ),
        st.integers(1, 5).map(bytes),
        st.binary(min_size=min(12, longest), max_size=longest),
    )


model_indices = st.integers(0, models.COUNT - 1)
denoising_indices = st.sampled_from(models.DENOISING)


#: Temperatures above 0, with and without top-k and top-p.
samplings = st.builds(
    Sampling,
    st.sampled_from([0.1, 0.5, 0.8, 1.0, 1.5]),
    st.one_of(st.none(), st.integers(1, 40)),
    st.one_of(st.none(), st.floats(0.1, 1.0)),
)


@st.composite
def requests(
    draw: st.DrawFn,
    index: int,
    *,
    stops: bool = True,
    longest: int = 24,
    sampling: Sampling = GREEDY,
) -> Request:
    """A request; stop strings are cut from what AR generates without them."""
    request = Request(draw(prompts()), draw(st.integers(1, longest)), seed=draw(st.integers(0, 9)))
    if not stops or draw(st.integers(0, 3)):
        return request
    text = bytes(ar_alone(index, request, sampling).output)
    if not text:
        return request
    at = draw(st.integers(0, len(text) - 1))
    stop = (text[at : at + draw(st.integers(1, 2))], b"never seen")
    return Request(request.prompt, request.max_new_bytes, stop, request.seed)


@st.composite
def batches(
    draw: st.DrawFn,
    index: int,
    *,
    rows: int = 3,
    stops: bool = True,
    sampling: Sampling = GREEDY,
) -> list[Request]:
    """One to ``rows`` requests."""
    one = requests(index, stops=stops, sampling=sampling)
    return draw(st.lists(one, min_size=1, max_size=rows))


@st.composite
def block_drafters(draw: st.DrawFn) -> BlockSteps:
    """One or several denoising steps, from each start, with each closure."""
    start, closure = draw(
        st.sampled_from([("aligned", "none"), ("frontier", "forced"), ("frontier", "none")])
    )
    return BlockSteps(draw(st.integers(1, 17)), draw(st.integers(1, 3)), start, closure)


@st.composite
def drafters(
    draw: st.DrawFn, index: int, batch: list[Request], sampling: Sampling = GREEDY
) -> Drafter:
    """Any drafter that model ``index`` can serve."""
    kinds = ["self", "random", "oracle", "oracle"]
    if index in models.DENOISING:
        kinds += ["block", "block", "cascade"]
    kind, count = draw(st.sampled_from(kinds)), draw(st.integers(1, 16))
    if kind == "self":
        return self_drafter(count)
    if kind == "random":
        return RandomBytes(draw(st.integers(0, 99)), count)
    if kind == "oracle":
        scheme = models.model(index).scheme
        texts = {
            (scheme.bos, *scheme.encode(r.prompt), i): ar_ids(index, r, sampling)
            for i, r in enumerate(batch)
        }
        return Oracle(
            texts, count, draw(st.sampled_from([0.0, 0.1, 0.3])), draw(st.integers(0, 99))
        )
    blocks = draw(block_drafters())
    return blocks if kind == "block" else Cascade(blocks, draw(st.integers(1, 3)))


STARTS = [("aligned", "none"), ("aligned", "forced"), ("frontier", "forced"), ("frontier", "none")]


def simple_rules() -> st.SearchStrategy[Unmasking]:
    """Unmasking rules that hold no other."""
    return st.one_of(
        st.just(FillAll(AllParams(), C)),
        st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]).map(
            lambda alpha: Confidence(ConfidenceParams(alpha=alpha), C)
        ),
        st.sampled_from([0.0, 0.5, 1.5, 6.0, 99.0]).map(
            lambda gamma: EntropyBound(EntropyBoundParams(gamma=gamma), C)
        ),
    )


def rules() -> st.SearchStrategy[Unmasking]:
    """The package's unmasking rules, nested in one another, from one byte a pass to all."""
    return st.recursive(simple_rules(), around, max_leaves=3)


def around(inner: st.SearchStrategy[Unmasking]) -> st.SearchStrategy[Unmasking]:
    """Rules around those of ``inner``."""
    several = st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=2)
    return st.one_of(
        st.builds(
            lambda n, rule: AtMost(AtMostParams(count=n, rule=rule), C), st.integers(1, 4), inner
        ),
        inner.map(lambda rule: LeftToRight(LeftToRightParams(rule=rule), C)),
        several.map(lambda each: AnyOf(AnyOfParams(rules=each), C)),
    )


def rules_in_order() -> st.SearchStrategy[Unmasking]:
    """Those that fill no byte later than one on its right."""
    ordered = rules().map(lambda rule: LeftToRight(LeftToRightParams(rule=rule), C))
    pairs = st.tuples(ordered, ordered).map(lambda two: dict(zip("ab", two, strict=True)))
    return st.one_of(
        st.just(FillAll(AllParams(), C)),
        ordered,
        pairs.map(lambda each: AnyOf(AnyOfParams(rules=each), C)),
    )


@st.composite
def diffusion_drafters(draw: st.DrawFn) -> DiffusionDrafter:
    """The drafter of BLT-DV."""
    start, closure = draw(st.sampled_from(STARTS))
    params = DiffusionParams(
        block_bytes=draw(st.integers(1, 16)), unmasking=draw(rules()), start=start, closure=closure
    )
    return DiffusionDrafter(params, C)


@st.composite
def own_drafters(draw: st.DrawFn, index: int) -> Drafter:
    """The package's drafters, nested in one another."""
    kind = draw(st.sampled_from(["stopping", "stopping", "lookup", "first"]))
    if kind == "lookup":
        return draw(lookup_drafters())
    if kind == "first":
        inner = st.lists(own_drafters(index), min_size=1, max_size=3)
        return first_drafter(draw(inner))
    return draw(stopping_drafters(index))


@st.composite
def stopping_drafters(draw: st.DrawFn, index: int, *, learning: bool = True) -> StoppingDrafter:
    """Those of them that can stop early; ``learning``: also one that chooses by earlier rounds."""
    kinds = ["self", "cascade", "until", "first", "model", *["adaptive"] * learning]
    kinds += ["diffusion", "diffusion"] * (index in models.DENOISING)
    kind, count = draw(st.sampled_from(kinds)), draw(st.integers(1, 12))
    inner = stopping_drafters(index, learning=learning)
    leaves = {"model": model_drafters(index), "diffusion": diffusion_drafters()}
    if kind == "self":
        return self_drafter(count)
    if kind in leaves:
        return draw(leaves[kind])
    if kind == "cascade":
        return cascade_drafter(count, draw(own_drafters(index)))
    if kind == "first":
        return first_drafter(draw(st.lists(inner, min_size=1, max_size=3)))
    if kind == "adaptive":
        price = draw(st.sampled_from([0.0, 2.0, 20.0]))
        return adaptive_drafter(count, draw(inner), price, stops=draw(st.booleans()))
    bound = draw(st.sampled_from([0.0, 0.1, 0.4, 0.8, 1.0]))
    return until_drafter(bound, draw(inner))


@st.composite
def drafters_with_q(draw: st.DrawFn, index: int) -> Drafter:
    """Those that tell what they draw from, nested in one another."""
    kinds = ["self", "cascade", "until", "first", "adaptive", "lookup", "model"]
    kinds += ["diffusion", "diffusion"] * (index in models.DENOISING)
    kind, count = draw(st.sampled_from(kinds)), draw(st.integers(1, 10))
    leaves = {
        "self": st.just(self_drafter(count)),
        "lookup": lookup_drafters(),
        "model": model_drafters(index),
        "first": st.lists(drafters_with_q(index), min_size=1, max_size=3).map(first_drafter),
    }
    if kind in leaves:
        return draw(leaves[kind])
    if kind == "cascade":
        return cascade_drafter(count, draw(own_drafters(index)))
    if kind == "diffusion":
        start, closure = draw(st.sampled_from(STARTS))
        params = DiffusionParams(
            block_bytes=count, unmasking=draw(rules_in_order()), start=start, closure=closure
        )
        return DiffusionDrafter(params, C)
    cascade = own_drafters(index).map(lambda drafter: cascade_drafter(count, drafter))
    inner = draw(st.one_of(st.just(self_drafter(count)), cascade))
    if kind == "until":
        return until_drafter(0.3, inner)
    return adaptive_drafter(count, inner, stops=draw(st.booleans()))


@st.composite
def model_drafters(draw: st.DrawFn, index: int) -> ModelDrafter:
    """The model itself, or another of the pool, as the draft model."""
    scheme = models.model(index).scheme
    alike = [other for other in range(models.COUNT) if models.model(other).scheme == scheme]
    other = draw(st.one_of(st.just(index), st.sampled_from(alike)))
    return model_drafter(index, other, draw(st.integers(1, 8)))


@st.composite
def lookup_drafters(draw: st.DrawFn) -> LookupDrafter:
    """Matches of one byte and more, which tiny models' repeating text is full of."""
    least = draw(st.integers(1, 3))
    params = LookupParams(
        draft_bytes=draw(st.integers(1, 16)),
        min_bytes=least,
        max_bytes=least + draw(st.integers(0, 4)),
    )
    return LookupDrafter(params, C)


OPS = ("append", "append", "rewind", "next", "next", "draft", "draft", "write", "block", "settle")
OPS += ("attach",)


def programs(*, longest: int = 14) -> st.SearchStrategy[list[tuple[str, int]]]:
    """Operations, each with a number from which its details are derived at run time."""
    step = st.tuples(st.sampled_from(OPS), st.integers(0, 2**16))
    return st.lists(step, min_size=3, max_size=longest)
