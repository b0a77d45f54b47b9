"""Every drafter with every verification: served as promised, or refused before any work.

Each leaf, each wrapper over a leaf, and each wrapper over such a wrapper.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest

from blt_core import ConfigError, Pipeline
from blt_core.errors import RequestError
from blt_core.plugins.loading import load_plugins
from tests.nightly import nightly_or
from tests.tiny import config, write_checkpoint

Q, STOPS = "gives_q", "stops_early"
#: What each leaf can do; names before a space are components.
LEAVES = {
    "self": ({"draft_bytes": 3}, {Q, STOPS}),
    "lookup": ({"min_bytes": 1, "draft_bytes": 4}, {Q}),
    "model": ({"draft_bytes": 2}, {Q, STOPS}),
    "diffusion": ({"block_bytes": 5}, {Q, STOPS}),
    "diffusion confidence": ({"block_bytes": 5, "unmasking": {"use": "confidence"}}, {STOPS}),
    "diffusion left-to-right": (
        {"block_bytes": 5, "unmasking": {"use": "left-to-right"}},
        {Q, STOPS},
    ),
}
#: What wraps a drafter: its table, what the inner one must do, what it can do itself.
WRAPPERS = {
    "cascade": ({"draft_bytes": 4}, set(), lambda inner: {Q, STOPS}),
    "until": ({"probability": 0.2}, {STOPS}, lambda inner: inner),
    "adaptive": (
        {"max_bytes": 5, "cost": {"use": "per-pass", "latent": 9.0}},
        set(),
        lambda inner: inner,
    ),
    "first": ({}, set(), lambda inner: inner),
}
NEEDS = {"replay": set(), "greedy": set(), "rejection": {Q}, "block": {Q}}


def leaves():
    for name, (keys, abilities) in LEAVES.items():
        yield name, {"use": name.split()[0], **keys}, abilities, True


def wrapped(inner):
    for name, (keys, needs, gives) in WRAPPERS.items():
        for below, table, abilities, served in inner:
            held = {"drafters": {"only": table}} if name == "first" else {"drafter": table}
            fits = served and needs <= abilities
            yield f"{name}({below})", {"use": name, **keys, **held}, gives(abilities), fits


ONE = list(wrapped(list(leaves())))
TWO = list(wrapped(ONE))
#: Of wrappers over wrappers the plain run tries these; the others ask for the same abilities.
OF_TWO = nightly_or(("replay",), tuple(NEEDS))
PAIRS = [
    pytest.param(*drafter[1:], verification, id=f"{drafter[0]}-{verification}")
    for drafters, verifications in (([*leaves(), *ONE], NEEDS), (TWO, OF_TWO))
    for drafter in drafters
    for verification in verifications
]
PROMPTS = ["the the the ", "ab"]
GREEDY, DRAWN = {"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.95}


def test_all_are_here():
    names = load_plugins().registry.names
    assert {each.split()[0] for each in LEAVES} | set(WRAPPERS) == set(names("drafter"))
    assert set(NEEDS) == set(names("verification"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    decoder = {**config()["decoder"], "denoises": True}
    return write_checkpoint(tmp_path_factory.mktemp("pairs") / "tiny", seed=4, decoder=decoder)


@pytest.fixture(scope="module")
def ar(checkpoint):
    run = {"checkpoint": str(checkpoint), "dtype": "float64", "max_new_bytes": 8, "seed": 5}
    return Pipeline.from_config({"schema": 1, "run": run})


@cache
def of_ar(ar, **asked):
    return [each.ids for each in ar.generate(PROMPTS, **asked)]


def with_checkpoint(table, checkpoint):
    """The table, with the checkpoint in all draft models that it holds."""
    table = copy.deepcopy(table)
    if table["use"] == "model":
        table["checkpoint"] = str(checkpoint)
    for key in ("drafter", "drafters"):
        if key in table:
            held = table[key]
            table[key] = (
                {name: with_checkpoint(each, checkpoint) for name, each in held.items()}
                if key == "drafters"
                else with_checkpoint(held, checkpoint)
            )
    return table


@pytest.mark.parametrize(("table", "abilities", "fits", "verification"), PAIRS)
def test_pair(ar, checkpoint, table, abilities, fits, verification):
    sampler = {
        "use": "speculative",
        "drafter": with_checkpoint(table, checkpoint),
        "verification": {"use": verification},
    }
    if not (fits and NEEDS[verification] <= abilities):
        with pytest.raises(ConfigError, match="needs a drafter that"):
            ar.with_sampler(sampler)
        return
    fast = ar.with_sampler(sampler)
    if verification == "greedy":
        with pytest.raises(RequestError, match="temperature"):
            fast.generate(PROMPTS, **DRAWN)
    # Those that are exact in law give other bytes where something is drawn.
    asked = DRAWN if verification == "replay" else GREEDY
    assert [each.ids for each in fast.generate(PROMPTS, **asked)] == of_ar(ar, **asked)
    if Q in NEEDS[verification]:
        prompt, seed = PROMPTS[-1], 8
        together = fast.generate(PROMPTS, **DRAWN, seed=[5, seed])[-1]
        alone = fast.generate(prompt, **DRAWN, seed=seed)
        assert (together.ids, together.passes) == (alone.ids, alone.passes)
