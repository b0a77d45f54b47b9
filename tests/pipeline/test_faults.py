"""An error in a plugin's component names it, its distribution and its cause; exit code 1."""

from __future__ import annotations

import attrs
import pytest
import torch

from blt_core.component import Component
from blt_core.errors import ComponentError, EngineError, RequestError
from blt_core.hookspecs import hookimpl
from blt_core.pipeline import Pipeline
from blt_core.plugins.loading import load_plugins
from blt_core.types import Cost, Parameters, Passes
from blt_core.wiring.config import Config
from tests.tiny import config


@attrs.frozen(kw_only=True)
class NoKeys:
    pass


class Base:
    def __init__(self, params, context):
        pass


class Drafter(Base):
    def draft(self, ops, limit, sampling, draws):
        return [1 / 0 for _ in limit]


class Leaver(Base):
    def draft(self, ops, limit, sampling, draws):
        raise SystemExit(7)


class Meddler(Base):
    def draft(self, ops, limit, sampling, draws):
        ops.rewind([0 for _ in limit])


class Verification(Base):
    def check(self, sampling):
        pass

    def accept(self, draft, logits_brV, positions, active, sampling, draws):
        return {}["accepted"]


class Unmasking(Base):
    def select(self, probs_bBV, masked_bB, starts, draws):
        return masked_bB.nowhere


class Sampler(Base):
    def check(self, sampling):
        pass

    def round(self, ops, sampling, draws):
        ops.append([[999] for _ in ops.lengths])


class Price(Base):
    def cost(self, passes, parameters):
        return PRICES["now"](passes)


PRICES = {}


class Plugin:
    @hookimpl
    def blt_components(self):
        parts = {
            "drafter": {"x": Drafter, "meddler": Meddler, "leaver": Leaver},
            "verification": {"x": Verification},
            "unmasking": {"x": Unmasking},
            "sampler": {"x": Sampler},
            "cost_model": {"x": Price},
        }
        return [
            Component(kind, f"acme/{name}", made, NoKeys, "breaks")
            for kind, named in parts.items()
            for name, made in named.items()
        ]


@pytest.fixture(scope="module")
def plugins():
    loaded = load_plugins(extra=[("blt-acme", "acme", Plugin())])
    assert not loaded.broken
    return loaded


@pytest.fixture(scope="module")
def pipeline(plugins):
    tables = config()
    tables["decoder"]["denoises"] = True
    return Pipeline.load(Config.from_mapping(tables), plugins)


@pytest.mark.parametrize(
    ("sampler", "message", "cause"),
    [
        ("speculative drafter.use=acme/x",
         "drafter 'acme/x' (blt-acme) failed: ZeroDivisionError: division by zero (test_faults.py",
         ZeroDivisionError),
        ("speculative drafter.use=cascade drafter.drafter.use=acme/x",
         "drafter 'acme/x' (blt-acme) failed: ZeroDivisionError", ZeroDivisionError),
        ("speculative drafter.use=acme/leaver",
         "drafter 'acme/leaver' (blt-acme) failed: SystemExit: 7", SystemExit),
        ("speculative verification.use=acme/x",
         "verification 'acme/x' (blt-acme) failed: KeyError: 'accepted'", KeyError),
        ("blt-d unmasking.use=acme/x",
         "unmasking 'acme/x' (blt-acme) failed: AttributeError", AttributeError),
    ],
)  # fmt: skip
def test_the_innermost_component_is_named(pipeline, sampler, message, cause):
    broken = pipeline.with_sampler(sampler)
    with pytest.raises(ComponentError) as caught:
        broken.generate("ab", max_new_bytes=20)
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value.__cause__, cause)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("acme/x", "sampler 'acme/x' (blt-acme): batch row 0: [999] are not all ids below 259"),
        ("speculative drafter.use=acme/meddler",
         "drafter 'acme/meddler' (blt-acme): batch row 0: cannot rewind to 0 ids"),
    ],
)  # fmt: skip
def test_who_breaks_the_contract_of_the_engine_is_named(pipeline, sampler, message):
    with pytest.raises(EngineError) as caught:
        pipeline.with_sampler(sampler).generate("ab", max_new_bytes=20)
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("part", "method", "given", "message"),
    [
        ("patcher", "flags", None, "gave NoneType as flags; expected torch.bool (1, 12)"),
        ("patcher", "flags", torch.ones(1, 12), "gave torch.float32 (1, 12) as flags"),
        ("patcher", "flags", torch.ones(1, 13).bool(), "gave torch.bool (1, 13) as flags"),
        ("global_model", "forward", None, "gave NoneType as latents"),
        ("global_model", "forward", torch.ones(1, 1, 24), "gave torch.float32 (1, 1, 24)"),
    ],
)
def test_a_part_that_gives_no_flags_or_latents_is_named(
    pipeline, monkeypatch, part, method, given, message
):
    broken = getattr(pipeline.model, part)
    monkeypatch.setattr(broken, method, lambda *_: given)
    with pytest.raises(ComponentError) as caught:
        pipeline.generate("ab cd ef gh", max_new_bytes=20)
    assert str(caught.value).startswith(f"{part.replace('_', ' ')} ")
    assert message in str(caught.value)


def test_a_part_that_gives_what_it_may_not_is_told_from_its_caller(pipeline, monkeypatch):
    forward = pipeline.model.decoder.forward

    def reads_and_gives_nothing(*given):
        forward(*given)

    monkeypatch.setattr(pipeline.model.decoder, "forward", reads_and_gives_nothing)
    with pytest.raises(ComponentError, match=r"in a call by sampler 'ar' \(blt-core\)\n.*a part"):
        pipeline.generate("ab cd ef gh", max_new_bytes=20)


def test_a_decoder_that_reads_nothing_is_named(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.model.decoder, "forward", lambda *_: None)
    with pytest.raises(
        ComponentError, match=r"^decoder 'local' \(blt-core\) has \[0\] rows"
    ) as found:
        pipeline.generate("ab cd ef gh", max_new_bytes=20)
    assert found.value.contract == "decoder.lengths"


def test_a_part_that_fails_is_named(pipeline, monkeypatch):
    def forward(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(torch.nn.functional, "silu", forward)
    name = r"^byte scorer 'transformer' \(blt-core\) failed: ZeroDivisionError"
    with pytest.raises(ComponentError, match=name):
        pipeline.generate("ab", max_new_bytes=2)


def test_a_request_that_cannot_be_served_is_no_component_s_fault(pipeline):
    with pytest.raises(RequestError) as caught:
        pipeline.with_sampler("blt-s verification.use=greedy").generate("ab", temperature=1.0)
    assert caught.value.exit_code == 2


def test_too_little_memory_is_nobodys_fault(pipeline, monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.nn.functional, "silu", forward)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.generate("ab", max_new_bytes=2)


def costs(total, **lines):
    return lambda _: Cost(total, lines)


@pytest.mark.parametrize(
    ("price", "message"),
    [
        (lambda _: 1 / 0, "failed: ZeroDivisionError"),
        (lambda _: 0.5, "gave 0.5; expected a Cost"),
        (costs(float("nan")), "gave total = nan; expected a finite number, 0 or more"),
        (costs(float("inf")), "gave total = inf"),
        (costs(-3), "gave total = -3"),
        (costs("3"), "gave total = '3'"),
        (costs(torch.ones(2)), "gave total = tensor"),
        (costs(1.0, decoder=float("nan")), "gave decoder = nan"),
        (lambda _: Cost(1.0, {}, unit=""), "gave unit = ''; expected a text such as 'GB'"),
    ],
)
def test_a_cost_that_is_none_is_found_before_any_work(plugins, price, message):
    PRICES["now"] = price
    with pytest.raises(ComponentError) as caught:
        Pipeline.load(Config.from_mapping(config(cost_model={"use": "acme/x"})), plugins)
    assert str(caught.value).startswith(f"cost model 'acme/x' (blt-acme) {message}")
    assert caught.value.exit_code == 1


def test_a_cost_that_is_none_for_some_passes_only_is_found_as_well(plugins):
    PRICES["now"] = lambda passes: Cost(float("nan") if passes.decoder else 0.0, {})
    tables = config(cost_model={"use": "acme/x"})
    pipeline = Pipeline.load(Config.from_mapping(tables), plugins)
    with pytest.raises(ComponentError, match="gave total = nan"):
        pipeline.generate("ab", max_new_bytes=2)
    with pytest.raises(ComponentError, match="gave total = nan"):
        pipeline.price(Passes(1), Parameters(1, 1, 1))


def test_a_class_that_many_share_names_no_component():
    from functools import partial

    from blt_core import faults

    made, other = partial(int), partial(int)
    faults.remember(made, "drafter 'acme/made' (blt-acme)")
    assert faults.name_of(made) == "drafter 'acme/made' (blt-acme)"
    assert faults.name_of(other) == "partial"
