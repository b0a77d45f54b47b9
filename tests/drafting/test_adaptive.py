"""The adaptive drafter's choice of length: close to the best fixed one, on any text."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from blt_core.component import BuildContext
from blt_core.errors import ComponentError
from blt_core.pipeline import Pipeline
from blt_core.published import SCALES
from blt_core.types import Cost, Parameters, Passes
from blt_plugins.cost.bandwidth import Bandwidth, BandwidthParams
from blt_plugins.drafting.adaptive import LENGTHS, Counted
from blt_plugins.drafting.forecast import Price, Prices, Record
from tests.nightly import nightly_or

PROMPTS = Path(__file__).parents[2] / "benchmarks" / "prompts"
CHOICES = tuple(n for n in LENGTHS if n <= 32)
PRICES = {
    "3b": Prices(1.0, (1.0,), (17.8,), 4.0),
    "no latents": Prices(1.0, (1.0,), (0.0,), 4.0),
    # As where arithmetic is what a pass waits for.
    "by rows": Prices(
        1.0, tuple(1 + 0.4 * n for n in range(33)), tuple(3 + 0.2 * n for n in range(33)), 4.0
    ),
}
#: Decoder passes of a draft of n bytes.
INNER = {"self": lambda n: n, "cascade": lambda n: 1 + n // 6, "look-up": lambda n: 0}


KINDS = {
    "steady": lambda place, easy: 0.8,
    "hopeless": lambda place, easy: 0.02,
    "repeats": lambda place, easy: 0.99,
    "first bytes only": lambda place, easy: 1.0 if place < 3 else 0.1,
    # Stretches of text that is easy, and of text that is not.
    "mixed": lambda place, easy: 0.97 if easy else 0.4,
}
SIZE = 6000


def price_of_a_byte(choose, kind, passes, prices, *, seed):
    """What a byte costs over a long text, the same for all who draft it."""
    rng, easy = Random(seed), []
    while len(easy) < SIZE + 99:
        easy += [rng.random() < 0.5] * rng.randrange(50, 300)
    luck = [rng.random() for _ in easy]
    cost, done = 0.0, 0
    while done < SIZE:
        asked, learn = choose()
        stood = 0
        while stood < asked and luck[done + stood] < KINDS[kind](stood, easy[done + stood]):
            stood += 1
        learn(asked, stood)
        cost += prices.of_round(passes(asked) if asked else 0, asked, stood + 1)
        done += stood + 1
    return cost / done


def adaptive(passes, prices):
    record = Record(prices)

    def choose():
        return record.choose(CHOICES, watched=False), learn

    def learn(asked, stood):
        if asked:
            ids = list(range(asked))
            record.drafted(0, asked, ids, passes(asked))
            record.learn([*ids[:stood], -1])

    return choose


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("prices", PRICES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_costs_hardly_more_than_with_the_best_fixed_length(kind, prices, inner):
    passes, price, seeds = INNER[inner], PRICES[prices], range(3)

    def total(make):
        return sum(price_of_a_byte(make(), kind, passes, price, seed=seed) for seed in seeds)

    fixed = {n: total(lambda n=n: lambda: (n, lambda asked, stood: None)) for n in CHOICES}
    assert total(lambda: adaptive(passes, price)) <= 1.05 * min(fixed.values()), fixed


@pytest.mark.parametrize("watched", [False, True])
def test_without_a_draft_that_pays_one_is_tried_now_and_then_ever_more_rarely(watched):
    record, tried = Record(PRICES["no latents"]), []
    for number in range(800):
        length = record.choose(CHOICES, watched=watched)
        if length:
            tried.append(number)
            if watched:
                record.goes_on([0.9], length)
            record.drafted(0, length, [1] * length, length)
            record.learn([2])
    gaps = [b - a for a, b in pairwise(tried)]
    assert gaps[-1] == 128
    assert sorted(gaps[-4:]) == gaps[-4:]


def test_a_draft_that_is_not_judged_yet_is_forgotten_by_a_rewind_behind_it():
    record = Record(PRICES["3b"])
    record.drafted(10, 4, [1, 2, 3, 4], 4)
    record.learn([1, 2, 9])
    assert (record.tried[:4], record.stood[:4]) == ([1, 1, 1], [1, 1, 0])


def likely(easy):
    return 0.98 if easy else 0.3


@pytest.mark.parametrize("told", ["well", "by half", "nothing", "sharpened"])
@pytest.mark.parametrize("per_pass", [1, 6])
@pytest.mark.parametrize("prices", PRICES)
def test_a_draft_that_is_watched_costs_hardly_more_than_any_fixed_length(prices, per_pass, told):
    """Three of ten bytes are hard, one by one; the drafter's top probabilities tell which."""
    price, rng = PRICES[prices], Random(1)
    easy = [rng.random() < 0.7 for _ in range(SIZE + 99)]
    stands = [rng.random() < likely(each) for each in easy]
    tops = {"well": likely, "by half": lambda e: 1 - (1 - likely(e)) / 2, "nothing": lambda e: 0.8}
    tops["sharpened"] = lambda e: 1.0

    def fixed(length):
        cost = done = 0
        while done < SIZE:
            stood = [*stands[done : done + length], False].index(False)
            cost += price.of_round(-(-length // per_pass), length, stood + 1)
            done += stood + 1
        return cost / done

    def watched():
        record, cost, done = Record(price), 0, 0
        while done < SIZE:
            asked, drafted, goes_on = record.choose(CHOICES, watched=True), 0, True
            while drafted < asked and goes_on:
                new = easy[done + drafted : done + min(drafted + per_pass, asked)]
                drafted += len(new)
                goes_on = record.goes_on([tops[told](each) for each in new], asked)
            stood = [*stands[done : done + drafted], False].index(False)
            passes = -(-drafted // per_pass)
            if asked:
                record.drafted(0, asked, [1] * drafted, passes)
                record.learn([1] * stood + [2])
            cost += price.of_round(passes, drafted, stood + 1)
            done += stood + 1
        return cost / done

    best = min(map(fixed, CHOICES))
    most = {"well": 0.98 if prices == "3b" else 1.05, "sharpened": 1.1}.get(told, 1.05)
    assert watched() <= most * best


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_demo_writes_for_hardly_more_than_with_the_best_fixed_length(temperature):
    pipeline = Pipeline.from_config({"schema": 1, "run": {"checkpoint": "demo:python"}})
    prompts = [path.read_text("utf-8") for path in sorted(PROMPTS.glob("*.txt"))]
    size, lengths = nightly_or((120, (16, 32)), (200, (4, 8, 16, 24, 32)))

    def gigabytes(sampler):
        results = pipeline.with_sampler(sampler).generate(
            prompts[: nightly_or(2, None)], max_new_bytes=size, temperature=temperature, seed=0
        )
        passes = sum((each.passes for each in results), Passes())
        return pipeline.price(passes, SCALES["3b"]).gigabytes

    fixed = {n: gigabytes(f"blt-cascade draft_bytes={n}") for n in lengths}
    fixed[0] = gigabytes("ar")
    assert gigabytes("blt-auto cost.use=per-pass") <= 1.03 * min(fixed.values()), fixed


class ByRows:
    """1 for a clean row of decoder or encoder, 3 of a block, 2 of the scorer, 10 for a patch."""

    def cost(self, passes, parameters):
        each = {"decoder": 1, "encoder": 1, "blocks": 3, "scorer": 2, "global_model": 10}
        lines = {part: n * getattr(passes.shapes, part).rows for part, n in each.items()}
        return Cost(sum(lines.values()) + passes.draft / 2, lines)


def test_prices_are_those_of_passes_as_wide_as_the_draft():
    prices = Prices.of(Price(ByRows(), SCALES["3b"]), patch_bytes=4.0, longest=7)
    assert prices.draft == 1
    assert prices.verify == tuple(3 * (drafted + 1) for drafted in range(8))
    # The encoder reads all of a patch when it closes, however few bytes are new.
    assert prices.latent == (14, 14, 14, 14, 15, 26, 27, 28)
    assert prices.of_byte == 3 + 14 / 4
    assert prices.of_verifying(99, 1) == 24 + 28 / 4
    assert prices.by_rows


def test_decoders_that_read_byte_states_run_the_encoder_in_each_pass():
    prices = Prices.of(Price(ByRows(), SCALES["3b"], reads_bytes=True), patch_bytes=4.0, longest=3)
    assert prices.draft == 2
    assert prices.verify == (4, 8, 12, 16)
    assert prices.latent == (10, 10, 10, 10)
    bandwidth = Bandwidth(BandwidthParams(bytes_per_parameter=1e9), BuildContext())
    sizes = Parameters(decoder=5, encoder=3, global_model=20)
    prices = Prices.of(Price(bandwidth, sizes, reads_bytes=True), patch_bytes=4.0, longest=1)
    assert (prices.draft, prices.verify, prices.latent) == (8, (8, 8), (20, 20))
    prices = Prices.of(Price(bandwidth, sizes), patch_bytes=4.0, longest=1)
    assert (prices.draft, prices.verify, prices.latent) == (5, (5, 5), (23, 23))


@pytest.mark.parametrize("slope", [0.0, 1e-4])
def test_a_draft_that_is_watched_may_be_the_longest_where_rows_cost_next_to_nothing(slope):
    prices = Prices(1.0, tuple(1 + slope * n for n in range(33)), (17.8,) * 33, 4.0)
    assert Record(prices).choose(CHOICES, watched=True) == 32


def test_a_drafter_that_writes_more_than_it_was_asked_for_is_told_to_stop():
    record = Record(PRICES["by rows"])
    record.choose(CHOICES, watched=True)
    assert not record.goes_on([0.5] * 40, 2)


def test_passes_of_a_draft_count_by_their_price():
    class Ops:
        def draft_logits(self, rows):
            return None

        denoise = charge = lambda self, *given: None

    counted = Counted(Ops(), [0.0, 0.0], Price(ByRows(), SCALES["3b"]), latent=17.0)
    counted.draft_logits([4, 0])
    counted.denoise(SimpleNamespace(ids=([1] * 6, [1] * 6), provisional=False), [False, True])
    counted.charge([Passes(), Passes(draft=3)], Passes(draft=3))
    assert counted.passes == [4.0, 18 + 1.5]


class Nothing:
    """All is free."""

    def cost(self, passes, parameters):
        return Cost(0, {})


def test_a_pass_that_costs_nothing_chooses_no_lengths():
    with pytest.raises(ValueError, match="cost: a decoder pass costs nothing, so lengths cannot"):
        Prices.of(Price(Nothing(), SCALES["3b"]), patch_bytes=4.0, longest=8)


@pytest.mark.parametrize("cost", [Cost(math.nan, {}), Cost(1.0, {"latent": -1.0}), 1.5])
def test_what_is_no_cost_is_laid_to_the_cost_model(cost):
    class Odd(Nothing):
        def cost(self, passes, parameters):
            return cost

    with pytest.raises(ComponentError, match=r"^Odd gave .*; expected a"):
        Prices.of(Price(Odd(), SCALES["3b"]), patch_bytes=4.0, longest=8)
