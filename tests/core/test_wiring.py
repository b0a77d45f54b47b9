from __future__ import annotations

from typing import Any

import attrs
import pytest
import tomli
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from blt_core.component import BuildContext, Preset, nested, nested_table
from blt_core.errors import ComponentError, ConfigError, PluginError
from blt_core.types import IdScheme
from blt_core.wiring.config import Config
from blt_core.wiring.merge import merge_checkpoint
from blt_core.wiring.resolve import build_node, resolve, resolve_component

MODEL = """
[model]
context_bytes = 128
[patcher]
use = "entropy"
[global_model]
use = "transformer"
latent_dim = 16
[decoder]
use = "local"
latent_dim = 16
trained_on_blocks = true
"""


def config(text: str, place: str = "tiny.toml") -> Config:
    return Config.from_mapping(tomli.loads("schema = 1\n" + text), place)


@pytest.fixture(scope="session")
def plan(plugins):
    return lambda text, **more: resolve(config(text), plugins, **more)


@pytest.fixture(scope="session")
def complaints(plugins, problems):
    return lambda text, **more: problems(resolve, config(text), plugins, **more)


# -- names and keys ------------------------------------------------------------------------------


def test_a_misspelt_name(complaints) -> None:
    assert complaints('[sampler]\nuse = "blt-vd"') == [
        (
            "tiny.toml: sampler.use: no sampler named 'blt-vd'. Did you mean 'blt-dv'?\n"
            "  installed samplers: ar, blt-dv, speculative      list all: blt plugins"
        )
    ]


def test_a_misspelt_key(complaints) -> None:
    (found,) = complaints(MODEL + '[sampler]\nuse = "blt-dv"\nblock_size = 4')
    assert found == (
        "tiny.toml: sampler.block_size: unknown key. Did you mean 'block_bytes'?\n"
        "  sampler 'blt-dv' (blt-core) takes: block_bytes, unmasking, verification"
    )


def test_a_key_of_another_component_of_the_kind_is_told_to_be_its(complaints) -> None:
    assert complaints('[sampler]\nuse = "ar"\nblock_bytes = 8') == [
        (
            "tiny.toml: sampler.block_bytes: unknown key. It is a key of sampler 'blt-dv'.\n"
            "  sampler 'ar' (blt-core) takes: no keys"
        )
    ]


def test_a_wrong_type(complaints) -> None:
    found = complaints(MODEL.replace('"entropy"', '"entropy"\nmax_patch_bytes = 8.5'))
    assert found == ["tiny.toml: patcher.max_patch_bytes: expected int, got float 8.5"]


def test_a_missing_key_and_a_missing_component(complaints) -> None:
    assert complaints('[model]\ncontext_bytes = 1\n[global_model]\nuse = "transformer"') == [
        (
            "tiny.toml: global_model.latent_dim: missing; "
            "global model 'transformer' (blt-core) needs it: int"
        )
    ]
    assert complaints('[sampler]\nuse = "speculative"') == [
        (
            "tiny.toml: sampler.drafter: missing; "
            "sampler 'speculative' (blt-core) needs it: a table that names a drafter"
        )
    ]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[sampler]", "sampler.use: missing; it names the sampler\n  installed: ar, blt-dv"),
        ("[sampler]\nuse = 3", "sampler.use: expected the name of a sampler, got int 3"),
        ("sampler = 3", "sampler: expected a table, got int 3"),
        ("run = 3", "run: expected a table, got int 3"),
        ("[verification]", "verification: not a top-level table; a verification belongs into the"),
        ("[samplr]", "samplr: unknown key. Did you mean 'sampler'?\n  a config takes: schema, run"),
        (
            '[sampler]\nuse = "speculative"\ndrafter = "self"',
            "sampler.drafter: expected a table, got str 'self'",
        ),
    ],
)
def test_malformed_tables(complaints, table, message) -> None:
    (found,) = complaints(table)
    assert found.startswith(f"tiny.toml: {message}")


def test_all_problems_of_a_file_at_once_in_its_order(complaints) -> None:
    found = complaints(
        """
        [samplr]
        [decoder]
        use = "local"
        latent_dim = "wide"
        window = 0
        [sampler]
        use = "speculative"
        unknown = 1
        [sampler.drafter]
        use = "diffusion"
        block_bytes = 1
        [sampler.drafter.unmasking]
        use = "entropy-bound"
        gamma = -1
        [sampler.verification]
        use = "greedie"
        [run]
        seed = "x"
        """,
        needs=["model", "patcher", "decoder"],
    )
    assert [problem.partition(": ")[2].partition(": ")[0] for problem in found] == [
        "samplr",
        "decoder.latent_dim",
        "decoder.window",
        "sampler.unknown",
        "sampler.drafter.block_bytes",
        "sampler.drafter.unmasking.gamma",
        "sampler.verification.use",
        "run.seed",
        "model",
        "patcher",
    ]


def test_needed_tables_say_how_to_come_by_them(complaints) -> None:
    assert complaints("", needs=["model", "sampler"]) == [
        (
            "tiny.toml: model: missing; this needs a table [model]\n"
            "  or name a checkpoint, which gives the model: [run] checkpoint = …"
        ),
        "tiny.toml: sampler: missing; this needs a table [sampler]",
    ]


def test_a_model_part_needs_the_model_table(complaints) -> None:
    (found,) = complaints('[global_model]\nuse = "transformer"\nlatent_dim = 1')
    assert found.startswith("tiny.toml: model: missing; this needs a table [model]")


def test_plugins_tables_are_settings_of_the_plan(load, fakes, problems) -> None:
    tables = fakes.make_plugin(settings={"train": fakes.GammaParams})
    plugins = load(extra=[("a", "b", tables)])
    plan = resolve(config("[train]\ngamma = 2"), plugins)
    assert plan.settings["train"] == fakes.GammaParams(2.0)
    assert plan.describe()["train"] == {"gamma": 2.0}
    assert problems(resolve, config("[train]\ngama = 2"), plugins)[0].startswith(
        "tiny.toml: train.gama: unknown key. Did you mean 'gamma'?\n  [train] takes: gamma"
    )


# -- dims and abilities --------------------------------------------------------------------------


def test_components_must_agree_on_dims(complaints) -> None:
    text = MODEL.replace("latent_dim = 16", "latent_dim = 512", 1).replace("= 16", "= 768")
    assert complaints(text) == [
        (
            "tiny.toml: components disagree on latent_dim: global_model says 512 "
            "(global_model.latent_dim), decoder says 768 (decoder.latent_dim)"
        )
    ]


def test_dims_of_nested_components_count(load, fakes, problems) -> None:
    scorer = fakes.component(
        "byte_scorer", "tiny", fakes.FakeScorer, fakes.ScorerParams, dims={"latent_dim": "dim"}
    )
    others = [record for record in fakes.COMPONENTS if record.name != "tiny"]
    text = MODEL.replace('"entropy"', '"entropy"\nbyte_scorer = { use = "tiny", dim = 3 }')
    assert problems(resolve, config(text), load(scorer, *others)) == [
        (
            "tiny.toml: components disagree on latent_dim: "
            "patcher.byte_scorer says 3 (patcher.byte_scorer.dim), "
            "global_model says 16 (global_model.latent_dim), decoder says 16 (decoder.latent_dim)"
        )
    ]


def test_dims_that_are_left_open_agree_with_any(load, fakes) -> None:
    scorer = fakes.component(
        "byte_scorer", "tiny", fakes.FakeScorer, fakes.ScorerParams, dims={"latent_dim": "window"}
    )
    others = [record for record in fakes.COMPONENTS if record.name != "tiny"]
    resolve(config(MODEL), load(scorer, *others))


BLT_DV = '[sampler]\nuse = "blt-dv"\n'


def test_missing_abilities_are_told_of_the_name_that_the_user_knows(complaints) -> None:
    assert complaints(MODEL.replace("true", "false") + BLT_DV) == [
        (
            "tiny.toml: sampler: sampler 'blt-dv' needs a decoder that denoises; "
            "'local' as configured was trained without blocks"
        )
    ]
    spelt_out = '[sampler]\nuse = "speculative"\ndrafter = { use = "diffusion" }'
    assert complaints(MODEL.replace("true", "false") + spelt_out) == [
        (
            "tiny.toml: sampler.drafter: drafter 'diffusion' needs a decoder that denoises; "
            "'local' as configured was trained without blocks"
        )
    ]
    assert complaints(BLT_DV) == [
        (
            "tiny.toml: sampler: sampler 'blt-dv' needs a decoder that denoises; "
            "there is no table [decoder]"
        )
    ]


def test_a_faulty_part_is_not_also_said_to_lack_abilities(complaints) -> None:
    assert len(complaints(MODEL.replace("true", '"yes"') + BLT_DV)) == 1


def test_abilities_of_third_parties_get_a_plain_phrase(load, fakes, problems) -> None:
    folds = frozenset({"decoder.folds"})
    sampler = fakes.component("sampler", "origami", fakes.FakeSampler, requires=folds)
    plugins = load(sampler, *fakes.COMPONENTS)
    assert problems(resolve, config(MODEL + '[sampler]\nuse = "origami"'), plugins) == [
        (
            "tiny.toml: sampler: sampler 'origami' needs a decoder with 'folds'; "
            "'local' as configured does not provide it"
        )
    ]


# -- presets -------------------------------------------------------------------------------------


def test_a_preset_is_what_it_expands_to(plan) -> None:
    gamma = '[sampler.unmasking]\nuse = "entropy-bound"\ngamma = 2\n'
    node = plan(MODEL + BLT_DV + "block_bytes = 4\n" + gamma).node("sampler")
    assert (node.name, node.presets) == ("speculative", ("blt-dv",))
    assert node.describe() == {
        "use": "speculative",
        "drafter": {
            "use": "diffusion",
            "block_bytes": 4,
            "unmasking": {"use": "entropy-bound", "gamma": 2.0},
        },
        "verification": {"use": "greedy"},
    }
    unmasking = node.children["drafter"].children["unmasking"]
    assert unmasking.path == "sampler.drafter.unmasking"
    assert str(unmasking.place) == "tiny.toml: sampler.unmasking", "where the user wrote it"


def test_problems_in_an_expansion_point_to_the_preset(complaints) -> None:
    assert complaints(MODEL + BLT_DV + "block_bytes = 1") == [
        "tiny.toml: sampler (expanded): drafter.block_bytes: expected at least 2, got 1"
    ]


def test_problems_of_a_presets_own_and_nested_keys_are_gathered(complaints) -> None:
    bad = 'block_byte = 1\n[sampler.unmasking]\nuse = "entropy-bound"\ngamma = "x"\n'
    found = complaints(MODEL + BLT_DV + bad)
    assert found[0].startswith("tiny.toml: sampler.block_byte: unknown key.")
    assert found[1:] == ["tiny.toml: sampler.unmasking.gamma: expected float, got str 'x'"]


def expanding(fakes, **presets):
    """Samplers that are presets without keys, by what they expand to."""
    return [
        Preset("sampler", name, fakes.NoKeys, expand, "a fake preset")
        for name, expand in presets.items()
    ]


def refuse(_):
    raise ValueError("not today")


def test_presets_may_expand_to_presets(load, fakes) -> None:
    presets = expanding(fakes, one=lambda _: {"use": "two"}, two=lambda _: {"use": "ar"})
    plan = resolve(config('[sampler]\nuse = "one"'), load(*presets, *fakes.COMPONENTS))
    assert (plan.node("sampler").name, plan.node("sampler").presets) == ("ar", ("one", "two"))
    assert plan.node("sampler").label == "sampler 'one'"


@pytest.mark.parametrize(
    ("expand", "message"),
    [
        (
            lambda _: {"use": "x"},
            "sampler: sampler 'x' leads back to itself: sampler 'x' -> sampler 'x'",
        ),
        (lambda _: 3, "sampler: sampler 'x' (blt-core) expands to int 3; expected a table"),
        (lambda _: {}, "sampler (expanded): use: missing; it names the sampler\n"),
        (lambda _: {"use": "arr"}, "sampler (expanded): use: no sampler named 'arr'."),
        (lambda _: {"use": "ar", "a": 1}, "sampler (expanded): a: unknown key.\n"),
        (refuse, "sampler: not today"),
        (lambda _: {}["oops"], "sampler: sampler 'x' (blt-core) failed: KeyError: 'oops'"),
    ],
)
def test_faulty_presets(load, fakes, problems, expand, message) -> None:
    plugins = load(*expanding(fakes, x=expand), *fakes.COMPONENTS)
    (found,) = problems(resolve, config('[sampler]\nuse = "x"'), plugins)
    assert found.startswith(f"tiny.toml: {message}")


# -- defaults and expansions that lead back to themselves ----------------------------------------


@attrs.frozen
class Wraps:
    inner: Any = nested("sampler", default="wraps")


@attrs.frozen
class Drafts:
    sampler: Any = nested("sampler", default="loop")


@pytest.fixture(scope="module")
def loops(load, fakes):
    """A sampler that is its own default, and a preset whose drafter nests that preset."""
    return load(
        fakes.component("sampler", "wraps", fakes.FakeSampler, Wraps),
        fakes.component("drafter", "drafts", fakes.FakeDrafter, Drafts),
        *expanding(fakes, loop=lambda _: {"use": "speculative", "drafter": {"use": "drafts"}}),
        *fakes.COMPONENTS,
    )


def test_a_default_that_is_the_component_itself(loops, problems) -> None:
    assert problems(resolve, config('[sampler]\nuse = "wraps"'), loops) == [
        (
            "tiny.toml: sampler.inner: sampler 'wraps' leads back to itself: "
            "sampler 'wraps' -> sampler 'wraps'"
        )
    ]


def test_a_preset_that_nests_itself(loops, problems) -> None:
    assert problems(resolve, config('[sampler]\nuse = "loop"'), loops) == [
        (
            "tiny.toml: sampler: sampler 'loop' leads back to itself: "
            "sampler 'loop' -> drafter 'drafts' -> sampler 'loop'"
        )
    ]


def test_what_the_user_nests_may_repeat(loops) -> None:
    wraps = '[sampler]\nuse = "wraps"\ninner = { use = "wraps", inner = { use = "ar" } }'
    assert len(list(resolve(config(wraps), loops).node("sampler").walk())) == 3


# -- building ------------------------------------------------------------------------------------


def test_nested_components_are_built_first(plan) -> None:
    ids = MODEL.replace("128", "128\nids = { bos = 256, eos = 257, size = 258 }")
    context = IdScheme(mask=None, size=258)
    patcher = plan(ids).build("patcher")
    assert type(patcher).__name__ == "FakePatcher"
    assert type(patcher.params.byte_scorer).__name__ == "FakeScorer"
    assert patcher.context.scheme == patcher.params.byte_scorer.context.scheme == context
    given = BuildContext(IdScheme(bos=300, size=301))
    assert plan(MODEL).build("decoder", given).context == given


def test_each_build_is_a_new_one(plan) -> None:
    made = plan(MODEL)
    assert made.build("decoder") is not made.build("decoder")


def test_what_is_not_there_cannot_be_built(plan, problems) -> None:
    assert problems(plan('[sampler]\nuse = "ar"').build, "decoder")[0].startswith(
        "tiny.toml: decoder: missing; this needs a table [decoder]"
    )
    with pytest.raises(ConfigError, match=r"tiny\.toml: model: missing"):
        _ = plan("").model


def failing(error: Exception):
    def factory(params, context):
        raise error

    return factory


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("dim must divide heads"), "dim must divide heads"),
        (PluginError("no"), "no"),
    ],
)
def test_factories_that_refuse_name_their_place(load, fakes, problems, error, text) -> None:
    drafter = fakes.component("drafter", "self", failing(error))
    others = [record for record in fakes.COMPONENTS if record.name != "self"]
    text_of_config = '[sampler]\nuse = "speculative"\ndrafter = { use = "self" }'
    plan = resolve(config(text_of_config), load(drafter, *others))
    assert problems(plan.build, "sampler", BuildContext()) == [
        f"tiny.toml: sampler.drafter: drafter 'self' cannot be built: {text}"
    ]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ModuleNotFoundError("no module 'x'"), "ModuleNotFoundError: no module 'x'"),
        (RuntimeError("can't allocate memory"), "RuntimeError: can't allocate memory"),
        (MemoryError(), "MemoryError"),
        (TypeError("no len()"), "TypeError: no len()"),
        (KeyError("oops"), "KeyError: 'oops'"),
    ],
)
def test_factories_that_fail_name_place_and_distribution_and_keep_the_cause(
    load, fakes, error, text
) -> None:
    drafter = fakes.component("drafter", "self", failing(error))
    others = [record for record in fakes.COMPONENTS if record.name != "self"]
    plugins = load(drafter, *others)
    table = '[sampler]\nuse = "speculative"\ndrafter = { use = "self" }'
    with pytest.raises(ComponentError) as caught:
        resolve(config(table), plugins).build("sampler", BuildContext())
    label = plugins.registry.lookup("drafter", "self").label
    assert str(caught.value) == f"tiny.toml: sampler.drafter: {label} cannot be built: {text}"
    assert "(" in label, "its distribution"
    assert caught.value.exit_code == 1
    assert caught.value.__cause__ is error


def test_what_a_function_makes_is_checked_once_it_is_made(load, fakes) -> None:
    wrong = fakes.component("sampler", "ar", lambda params, context: fakes.FakePatcher(None, None))
    plan = resolve(config('[sampler]\nuse = "ar"'), load(wrong))
    with pytest.raises(
        PluginError, match=r"sampler 'ar' \(blt-core\): FakePatcher: method 'check'"
    ):
        plan.build("sampler", BuildContext())


def test_one_component_of_any_kind_can_be_resolved_by_itself(plugins, problems) -> None:
    node = resolve_component("drafter", {"use": "self"}, plugins)
    assert type(build_node(node, BuildContext(), plugins.registry)).__name__ == "FakeDrafter"
    assert problems(resolve_component, "drafter", {"use": "slef"}, plugins, place="here")[
        0
    ].startswith("here: drafter.use: no drafter named 'slef'. Did you mean 'self'?")


# -- describing ----------------------------------------------------------------------------------

scorers = st.none() | st.fixed_dictionaries(
    {"use": st.just("tiny")}, optional={"dim": st.integers(), "window": st.integers()}
)
unmaskings = st.just({"use": "all"}) | st.fixed_dictionaries(
    {"use": st.just("entropy-bound")}, optional={"gamma": st.floats(0, 9)}
)
samplers = st.just({"use": "ar"}) | st.fixed_dictionaries(
    {"use": st.just("blt-dv")},
    optional={
        "block_bytes": st.integers(2, 99),
        "unmasking": unmaskings,
        "verification": st.just({"use": "greedy"}),
    },
)
decoders = st.fixed_dictionaries(
    {"use": st.just("local"), "latent_dim": st.just(16), "trained_on_blocks": st.just(True)},
    optional={"dim": st.integers(), "window": st.integers(1)},
)


@given(scorers, samplers, decoders, st.integers(0, 2**63 - 1))
def test_a_description_resolves_to_the_same_plan(plugins, scorer, sampler, decoder, seed) -> None:
    tables = config(MODEL + f"[run]\nseed = {seed}").tables | {"sampler": sampler}
    tables["decoder"] = decoder
    if scorer is not None:
        tables["patcher"] = {"use": "entropy", "byte_scorer": scorer}
    plan = resolve(Config.from_mapping(tables), plugins)
    described = plan.describe()
    again = resolve(Config.from_mapping(tomli.loads(tomli_w.dumps(described))), plugins)
    assert again == plan
    assert again.describe() == described


def test_a_checkpoint_stores_the_model_only(plan) -> None:
    stored = plan(MODEL + BLT_DV + "[run]\nseed = 3").describe_model()
    assert list(stored) == ["schema", "model", "patcher", "global_model", "decoder"]
    assert stored["patcher"]["byte_scorer"] == {"use": "tiny", "dim": 4}


# -- checkpoints ---------------------------------------------------------------------------------

RUN = '[run]\ncheckpoint = "demo:python"\n'


@pytest.fixture(scope="session")
def merged(plan, plugins):
    """A run's config on top of the model's checkpoint; ``change`` edits what is stored."""
    stored = plan(MODEL).describe_model()

    def merged(text: str, change=lambda tables: None) -> Config:
        tables = tomli.loads(tomli_w.dumps(stored))
        change(tables)
        return merge_checkpoint(config(text), tables, plugins)

    return merged


def test_a_run_takes_the_model_from_its_checkpoint(merged, plugins, plan) -> None:
    taken = resolve(merged(RUN + BLT_DV), plugins, needs=["model", "patcher", "decoder"])
    assert taken.describe_model() == plan(MODEL).describe_model()
    assert taken.node("sampler").presets == ("blt-dv",)
    assert taken.run.checkpoint == "demo:python"


def test_a_run_may_override_what_is_marked_so_also_below(merged, plugins) -> None:
    own = """
    [decoder]
    use = "local"
    window = 5
    [patcher]
    max_patch_bytes = 4
    [patcher.byte_scorer]
    window = 7
    """
    plan = resolve(merged(RUN + own), plugins)
    assert plan.node("decoder").params.window == 5
    assert plan.node("decoder").params.trained_on_blocks, "the checkpoint's other keys stay"
    assert plan.node("patcher").params.max_patch_bytes == 4
    assert plan.node("patcher").children["byte_scorer"].params.window == 7


def test_a_run_may_repeat_what_its_checkpoint_says(merged, plugins, problems) -> None:
    plan = resolve(merged(RUN + "[decoder]\nwindow = 5\n" + BLT_DV), plugins)
    printed = tomli_w.dumps(plan.describe()).removeprefix("schema = 1\n")
    assert resolve(merged(printed), plugins) == plan

    def strip(tables):
        del tables["decoder"]["dim"], tables["patcher"]["byte_scorer"], tables["model"]["ids"]

    assert resolve(merged(printed, strip), plugins) == plan, "the checkpoint may leave defaults out"
    for same, other in (("dim = 8", "dim = 9"), ("dim = 4", "dim = 5"), ("bos = 256", "bos = 258")):
        assert same in printed
        (found,) = problems(resolve, merged(printed.replace(same, other), strip), plugins)
        assert "comes from the checkpoint and cannot be overridden." in found


def test_what_a_run_may_not_override_joins_the_other_problems(merged, plugins, problems) -> None:
    own = """
    [decoder]
    dim = 6
    windw = 4
    window = "wide"
    [global_model]
    use = "other"
    [patcher]
    byte_scorer = { use = "huge", dim = 5 }
    [encoder]
    use = "local"
    [model]
    context_bytes = 4
    [sampler]
    use = "art"
    """
    free = "\n  overridable here: "
    found = problems(resolve, merged(RUN + own), plugins)
    fixed = "comes from the checkpoint and cannot be overridden."
    assert found[:7] == [
        f"tiny.toml: decoder.dim: {fixed}{free}window",
        f"tiny.toml: decoder.windw: unknown key. Did you mean 'window'?{free}window",
        "tiny.toml: global_model.use: the checkpoint has 'transformer'; it cannot be replaced",
        "tiny.toml: patcher.byte_scorer.use: the checkpoint has 'tiny'; it cannot be replaced",
        f"tiny.toml: patcher.byte_scorer.dim: {fixed}{free}window",
        "tiny.toml: encoder: the checkpoint has no such table; it cannot be replaced by a table",
        f"tiny.toml: model.context_bytes: {fixed}{free}nothing",
    ]
    assert found[7].startswith("tiny.toml: sampler.use: no sampler named 'art'.")
    assert found[8] == "tiny.toml: decoder.window: expected int, got str 'wide'"


def test_problems_of_a_checkpoints_own_tables_name_it(merged, plugins, problems) -> None:
    def spoil(tables):
        tables["decoder"]["use"] = "lokal"
        tables["global_model"]["latent_dim"] = 0
        tables["schema"] = 2

    found = problems(resolve, merged(RUN + "[decoder]\nuse = 'lokal'", spoil), plugins)
    assert found[0].startswith("demo:python: schema: expected 1, the one schema")
    assert found[1] == "demo:python: global_model.latent_dim: expected at least 1, got 0"
    assert found[2].startswith("demo:python: decoder.use: no decoder named 'lokal'.")


def test_abilities_that_a_checkpoint_lacks(merged, plugins, problems) -> None:
    def spoil(tables):
        tables["decoder"]["trained_on_blocks"] = False

    assert problems(resolve, merged(RUN + BLT_DV, spoil), plugins) == [
        (
            "tiny.toml: sampler: sampler 'blt-dv' needs a decoder that denoises; "
            "'local' from this checkpoint was trained without blocks"
        )
    ]


# -- tables of components ------------------------------------------------------------------------


@attrs.frozen
class ChoirParams:
    voices: Any = nested_table("drafter")


@pytest.fixture(scope="module")
def choir(load, fakes):
    """A sampler that nests any number of drafters."""
    sampler = fakes.component("sampler", "choir", fakes.FakeSampler, ChoirParams)
    return load(sampler, *fakes.COMPONENTS)


CHOIR = """
[sampler]
use = "choir"
[sampler.voices.high]
use = "self"
[sampler.voices.low]
use = "self"
"""


def test_a_table_of_components_is_built_under_its_names(choir) -> None:
    node = resolve(config(CHOIR), choir).node("sampler")
    assert list(node.children) == ["voices.high", "voices.low"]
    assert [each.path for each in node.walk()] == [
        "sampler", "sampler.voices.high", "sampler.voices.low",
    ]  # fmt: skip
    built = build_node(node, BuildContext(), choir.registry)
    assert {name: type(each).__name__ for name, each in built.params.voices.items()} == {
        "high": "FakeDrafter",
        "low": "FakeDrafter",
    }


def test_a_table_of_components_is_described_as_what_resolves_to_it(choir) -> None:
    node = resolve(config(CHOIR), choir).node("sampler")
    again = resolve_component("sampler", node.describe(), choir)
    assert again.describe() == node.describe()
    assert node.describe()["voices"].keys() == {"high", "low"}


def test_faults_in_a_table_of_components_are_gathered_with_their_places(choir, problems) -> None:
    faulty = CHOIR.replace('"self"', '"nobody"') + "[sampler.voices.third]\n"
    found = problems(resolve, config(faulty), choir)
    assert [problem.split(": ")[1] for problem in found] == [
        "sampler.voices.high.use",
        "sampler.voices.low.use",
        "sampler.voices.third.use",
    ]
    (found,) = problems(resolve, config('[sampler]\nuse = "choir"'), choir)
    assert found.endswith("needs it: under each of some names, a table that names a drafter")
    (found,) = problems(resolve, config('[sampler]\nuse = "choir"\nvoices = 3'), choir)
    assert found.endswith("sampler.voices: expected a table, got int 3")


def test_requirements_in_a_table_of_components_count(choir, problems) -> None:
    text = MODEL.replace("true", "false") + CHOIR.replace('"self"', '"diffusion"', 1)
    (found,) = problems(resolve, config(text), choir)
    assert found.startswith("tiny.toml: sampler.voices.high: drafter 'diffusion' needs a decoder")


def test_a_run_may_override_keys_within_a_checkpoints_table_of_components(
    load, fakes, problems
) -> None:
    @attrs.frozen
    class Scorers:
        scorers: Any = nested_table("byte_scorer")

    patcher = fakes.component("patcher", "many", fakes.FakePatcher, Scorers)
    plugins = load(patcher, *fakes.COMPONENTS)
    stored = {
        "schema": 1,
        "model": {"context_bytes": 8},
        "patcher": {"use": "many", "scorers": {"a": {"use": "tiny"}, "b": {"use": "tiny"}}},
    }

    def merged(table: str):
        own = config("[patcher.scorers." + table)
        return resolve(merge_checkpoint(own, stored, plugins), plugins).describe()

    scorers = merged("a]\nwindow = 3")["patcher"]["scorers"]
    assert scorers["a"]["window"] == 3
    assert scorers["b"].get("window") != 3
    (found,) = problems(merged, 'c]\nuse = "tiny"')
    assert "patcher.scorers.c: the checkpoint has no such table" in found
    (found,) = problems(merged, "a]\ndim = 99")
    assert "patcher.scorers.a.dim: comes from the checkpoint" in found
