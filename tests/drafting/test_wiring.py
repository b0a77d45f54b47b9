"""Which drafters, verifications and models go together, and what presets stand for."""

from __future__ import annotations

import pytest

from blt_core import ConfigError, Pipeline
from blt_core.plugins.loading import load_plugins
from blt_core.tables.inline import parse_inline
from blt_core.wiring.config import Config
from blt_core.wiring.resolve import resolve
from blt_plugins.drafting.adaptive import AdaptiveDrafter
from tests.tiny import config

Q = "needs a drafter that tells what it draws from"
STOPS = "needs a drafter that can stop early"


def resolved(spec: str, *, denoises: bool = False):
    tables = config()
    if denoises:
        tables["decoder"]["denoises"] = True
    tables["sampler"] = parse_inline(spec, "sampler")
    return resolve(Config.from_mapping(tables, "tiny.toml"), load_plugins()).node("sampler")


SERVED = [
    "speculative verification.use={law}",
    "speculative verification.use={law} drafter.use=lookup",
    "speculative verification.use={law} drafter.use=cascade drafter.drafter.use=lookup",
    "speculative verification.use={law} drafter.use=until",
    "speculative verification.use={law} drafter.use=adaptive drafter.drafter.use=self",
    (
        "speculative verification.use={law} drafter.use=first drafter.drafters.a.use=lookup "
        "drafter.drafters.b.use=self"
    ),
    "speculative verification.use={law} drafter.use=diffusion drafter.unmasking.use=all",
]
NOT_ONE_BY_ONE = [
    "drafter.use=diffusion drafter.unmasking.use=confidence",
    (
        "drafter.use=first drafter.drafters.a.use=self drafter.drafters.b.use=diffusion "
        "drafter.drafters.b.unmasking.use=entropy-bound"
    ),
    "drafter.use=until drafter.drafter.use=diffusion drafter.drafter.unmasking.use=confidence",
    "drafter.use=adaptive drafter.drafter.use=diffusion drafter.drafter.unmasking.use=confidence",
]


@pytest.mark.parametrize("law", ["rejection", "block"])
@pytest.mark.parametrize("spec", SERVED)
def test_verifications_in_law_take_drafters_that_give_q(spec, law):
    resolved(spec.format(law=law), denoises=True)


@pytest.mark.parametrize("law", ["rejection", "block"])
@pytest.mark.parametrize("spec", NOT_ONE_BY_ONE)
def test_verifications_in_law_refuse_drafts_that_are_not_made_one_by_one(spec, law):
    with pytest.raises(ConfigError) as caught:
        resolved(f"speculative verification.use={law} {spec}", denoises=True)
    assert f"verification {law!r} {Q}" in str(caught.value)
    assert "as configured does not draw its bytes one by one" in str(caught.value)
    resolved(f"speculative {spec}", denoises=True)  # replay takes any


@pytest.mark.parametrize(
    "inner",
    [
        "drafter.drafter.use=lookup",
        (
            "drafter.drafter.use=first drafter.drafter.drafters.a.use=self "
            "drafter.drafter.drafters.b.use=lookup"
        ),
        "drafter.drafter.use=adaptive drafter.drafter.drafter.use=lookup",
    ],
)
def test_until_refuses_a_drafter_that_knows_no_probabilities(inner):
    with pytest.raises(ConfigError) as caught:
        resolved(f"speculative drafter.use=until {inner}")
    assert f"drafter 'until' {STOPS}" in str(caught.value)
    assert "knows no probabilities to stop by" in str(caught.value)


def test_a_wrapper_needs_abilities_of_what_it_holds_not_of_what_stands_beside_it():
    beside = "drafter.use=first drafter.drafters.a.use=lookup drafter.drafters.b.use=until"
    resolved(f"speculative {beside} drafter.drafters.b.drafter.use=self")
    with pytest.raises(ConfigError, match="'until' needs a drafter that can stop early"):
        resolved(f"speculative {beside} drafter.drafters.b.drafter.use=lookup")


@pytest.mark.parametrize("denoises", [False, True])
@pytest.mark.parametrize("preset", ["blt-cascade", "blt-auto"])
def test_presets_diffuse_where_the_decoder_can(preset, denoises):
    node = resolved(f"{preset} draft_bytes=12", denoises=denoises)
    names = [each.name for each in node.walk()]
    assert node.presets == (preset,)
    assert names[:1] == ["speculative"]
    assert ("diffusion" in names) == ("first" in names) == denoises
    assert {"cascade", "lookup", "replay"} < set(names)
    assert ("adaptive" in names) == (preset == "blt-auto")
    # What it stands for resolves to the same.
    tables = config(sampler=node.describe())
    if denoises:
        tables["decoder"]["denoises"] = True
    again = resolve(Config.from_mapping(tables), load_plugins()).node("sampler")
    assert again.describe() == node.describe()


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("lookup min_bytes=9", "min_bytes: expected at most max_bytes = 8, got 9"),
        ("lookup max_bytes=65", "max_bytes: expected 1 to 64, got 65"),
        ("first drafters={}", "expected at least one drafter, as in drafters.a.use = 'lookup'"),
        ("until probability=1.5 drafter.use=self", "probability: expected 0 to 1, got 1.5"),
        ("adaptive max_bytes=0 drafter.use=self", "max_bytes: expected at least 1"),
    ],
)
def test_keys_of_drafters_are_checked(spec, text):
    name, _, keys = spec.partition(" ")
    nested = " ".join(f"drafter.{key}" for key in keys.split(" "))
    with pytest.raises(ConfigError) as caught:
        resolved(f"speculative drafter.use={name} {nested}")
    assert text in str(caught.value)


def test_lengths_are_chosen_by_the_weights_of_the_model_that_drafts():
    pipeline = Pipeline.from_config(config(sampler={"use": "blt-auto"}))
    prices, sizes = pipeline.sampler.drafter.prices, pipeline.parameter_counts
    weights = (sizes.encoder + sizes.global_model) / sizes.decoder
    assert prices.latent[0] / prices.draft == pytest.approx(weights)
    assert {*prices.verify} == {prices.draft}
    prices = pipeline.with_sampler(
        "blt-auto cost.use=per-pass cost.latent=5"
    ).sampler.drafter.prices
    assert (prices.draft, prices.latent[0]) == (1.0, 5.0)


def test_drafts_of_decoders_that_read_byte_states_are_priced_with_the_encoder():
    tables = config(sampler={"use": "blt-auto"})
    tables["encoder"]["dim"] = tables["decoder"]["dim"]
    tables["decoder"]["reads_byte_states"] = True
    pipeline = Pipeline.from_config(tables)
    prices, sizes = pipeline.sampler.drafter.prices, pipeline.parameter_counts
    read = (sizes.decoder + sizes.encoder) * 2 / 1e9
    assert prices.draft == pytest.approx(read)
    assert {*prices.verify} == {prices.draft}
    assert prices.latent[0] == pytest.approx(sizes.global_model * 2 / 1e9)


def test_lengths_are_chosen_in_seconds_where_passes_were_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="no passes were measured on this machine") as caught:
        Pipeline.from_config(config(sampler={"use": "blt-auto", "cost": {"use": "roofline"}}))
    assert "fix: blt calibrate-cost SOURCE" in str(caught.value)


def test_a_look_up_finds_what_stands_in_files(tmp_path):
    source = tmp_path / "source.txt"
    source.write_bytes(b"the quick brown fox jumps")
    spec = f"speculative drafter.use=lookup drafter.files=['{source}'] drafter.draft_bytes=6"
    tables = config(sampler=parse_inline(spec, "sampler"))
    pipeline = Pipeline.from_config(tables)
    drafts = []
    inner = pipeline.sampler.drafter.draft

    def looking(*given):
        drafts.append(inner(*given))
        return drafts[-1]

    pipeline.sampler.drafter.draft = looking
    # The model's own first byte rarely goes on with the file; a prompt that ends in it does.
    result = pipeline.generate("a quick brow", max_new_bytes=8)
    assert result.ids == pipeline.with_sampler("ar").generate("a quick brow", max_new_bytes=8).ids
    cache = [each for each in drafts if each.ids[0]]
    assert all(len(each.ids[0]) <= 6 for each in cache)


@pytest.mark.parametrize("kind", ["none", "folder"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, kind):
    path = tmp_path / "missing" if kind == "none" else tmp_path
    spec = f"speculative drafter.use=lookup drafter.files=['{path}']"
    with pytest.raises(ConfigError) as caught:
        Pipeline.from_config(config(sampler=parse_inline(spec, "sampler")))
    assert str(path) in str(caught.value)
    assert "drafter 'lookup'" in str(caught.value)


@pytest.mark.parametrize(
    ("inner", "can"),
    [
        ({"use": "self"}, {"stops_early", "gives_q"}),
        ({"use": "lookup"}, {"gives_q"}),
        ({"use": "first", "drafters": {"a": {"use": "lookup"}, "b": {"use": "self"}}}, {"gives_q"}),
    ],
)
def test_a_component_is_told_what_all_that_it_nests_can_do(monkeypatch, inner, can):
    seen, build = [], AdaptiveDrafter.__init__
    monkeypatch.setattr(
        AdaptiveDrafter,
        "__init__",
        lambda self, p, c: (seen.append(c.nested), build(self, p, c))[1],
    )
    table = {"use": "speculative", "drafter": {"use": "adaptive", "drafter": inner}}
    Pipeline.from_config({**config(), "sampler": table})
    assert seen == [{f"drafter.{name}" for name in can}]
