from __future__ import annotations

import pytest
import torch

import blt_core
from blt_core import ConfigError, RequestError, hookimpl
from blt_core.pipeline import Pipeline
from blt_core.plugins.loading import load_plugins
from blt_core.wiring.config import Config
from tests.tiny import config


def test_one_prompt_gives_one_result_and_several_a_list(pipeline):
    one = pipeline.generate("a", max_new_bytes=6)
    several = pipeline.generate(["a", b"\x00b"], max_new_bytes=6)
    assert isinstance(several, list)
    assert several[0].output == one.output
    assert one.passes.decoder >= len(one.output)
    assert one.cost.gigabytes == sum(one.cost.lines.values())


def test_with_sampler_shares_the_model_and_leaves_the_original_alone(pipeline):
    fast = pipeline.with_sampler("blt-s draft_bytes=5")
    table = pipeline.with_sampler({"use": "blt-s", "draft_bytes": 5})
    assert fast.model is pipeline.model
    expected = pipeline.generate("hello", max_new_bytes=30)
    for other in (fast, table):
        result = other.generate("hello", max_new_bytes=30)
        assert result.output == expected.output
        assert result.drafted > 0
    assert expected.drafted == 0


def test_stream_joins_to_the_output(pipeline):
    expected = pipeline.generate("def", max_new_bytes=30)
    assert b"".join(pipeline.stream("def", max_new_bytes=30)) == expected.output


def test_text_stream_yields_whole_characters_and_joins_to_the_text(pipeline):
    expected = pipeline.generate("\u00e9", max_new_bytes=60)
    pieces = list(pipeline.stream_text("\u00e9", max_new_bytes=60))
    assert "".join(pieces) == expected.text
    assert all(isinstance(piece, str) and piece for piece in pieces)


def test_unknown_request_setting_is_refused_before_any_work(pipeline):
    with pytest.raises(RequestError, match="max_bytes: no such request setting"):
        pipeline.generate("a", max_bytes=3)
    with pytest.raises(RequestError, match="no prompts"):
        pipeline.generate([])
    with pytest.raises(RequestError, match="exceed the model's context"):
        pipeline.stream("a" * 300, max_new_bytes=1)


def test_config_without_a_checkpoint_builds_random_weights_from_the_seed():
    build = lambda seed: Pipeline.from_config(config(run={"seed": seed}))  # noqa: E731
    first, again, other = build(1), build(1), build(2)
    state = [p.model.decoder.head.weight for p in (first, again, other)]
    assert torch.equal(state[0], state[1])
    assert not torch.equal(state[0], state[2])


def test_building_a_model_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Pipeline.from_config(config())
    assert torch.equal(torch.rand(3), expected)


def test_a_config_that_lacks_model_parts_says_which():
    tables = config(encoder=None, decoder=None)
    with pytest.raises(ConfigError) as caught:
        Pipeline.from_config(tables)
    text = str(caught.value)
    assert "encoder" in text
    assert "decoder" in text


def test_threshold_of_a_checkpoint_can_be_overridden(checkpoint):
    run = {"checkpoint": str(checkpoint)}
    low = Pipeline.from_config({"schema": 1, "run": run, "patcher": {"threshold": 0.0}})
    high = Pipeline.from_config({"schema": 1, "run": run, "patcher": {"threshold": 50.0}})
    short, long = (p.generate("abcdefgh", max_new_bytes=20).passes.encoder for p in (low, high))
    assert short > long


def test_observers_see_start_steps_and_end():
    seen = []

    class Observer:
        @hookimpl
        def blt_run_start(self, run):
            seen.append(("start", len(run.requests)))

        @hookimpl
        def blt_run_step(self, run, step):
            seen.append(("step", len(step.new[0])))

        @hookimpl
        def blt_run_end(self, run, result):
            seen.append(("end", result is not None))

    plugins = load_plugins(extra=[("blt-trace", "trace", Observer())])
    pipeline = Pipeline.load(Config.from_mapping(config()), plugins)
    pipeline.generate("a", max_new_bytes=3)
    assert [name for name, _ in seen] == ["start", "step", "step", "step", "end"]


def test_a_third_party_sampler_works_through_toml_alone():
    from blt_core.component import Component
    from blt_plugins.sampling.autoregressive import Autoregressive, AutoregressiveParams

    record = Component("sampler", "acme/slow", Autoregressive, AutoregressiveParams, "one more")

    class Plugin:
        @hookimpl
        def blt_components(self):
            return [record]

    plugins = load_plugins(extra=[("blt-acme", "acme", Plugin())])
    pipeline = Pipeline.load(Config.from_mapping(config(sampler={"use": "acme/slow"})), plugins)
    assert len(pipeline.generate("a", max_new_bytes=3).output) <= 3


def test_public_names_exist():
    for name in blt_core.__all__:
        assert hasattr(blt_core, name)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"max_new_bytes": "5"}, "request: max_new_bytes: expected int, got str '5'"),
        ({"max_new_bytes": 5.5}, "expected int, got float 5.5"),
        ({"seed": 1.5}, "expected int"),
        ({"top_k": 1.5}, "expected int"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperatur": 1.0}, "Did you mean 'temperature'"),
        ({"stop": [""]}, "stop"),
        ({"stop": "\ud800"}, "no character"),
    ],
)
def test_requests_are_as_strict_as_files(pipeline, request_, message):
    with pytest.raises(RequestError) as caught:
        pipeline.check(["a"], **request_)
    assert message in str(caught.value)


def test_bytes_like_prompts_and_escaped_bytes_are_served(pipeline):
    expected = pipeline.generate(b"\xffa", max_new_bytes=4).output
    for prompt in (bytearray(b"\xffa"), memoryview(b"\xffa"), "\udcffa"):
        assert pipeline.generate(prompt, max_new_bytes=4).output == expected
    with pytest.raises(RequestError, match="no character"):
        pipeline.generate("\ud800")


def test_a_stop_may_be_one_text_or_several_or_bytes(pipeline):
    whole = pipeline.generate("q", max_new_bytes=30).output
    stop = whole[8:10]
    expected = whole[: whole.index(stop) + 2]
    for given in (stop, [stop, b"never"], (stop,)):
        result = pipeline.generate("q", max_new_bytes=30, stop=given)
        assert (result.output, result.stop_reason) == (expected, "stop")


def test_low_precision_leaves_the_patcher_in_float32(checkpoint):
    run = {"checkpoint": str(checkpoint), "dtype": "bfloat16"}
    low = Pipeline.from_config({"schema": 1, "run": run})
    dtypes = {p.dtype for p in low.model.patcher.parameters()}
    assert dtypes == {torch.float32}
    assert low.model.decoder.head.weight.dtype == torch.bfloat16
    assert len(low.generate("abc", max_new_bytes=8).output) <= 8


def test_a_broken_checkpoint_format_does_not_stand_in_the_way(checkpoint):
    from blt_core.component import Component
    from blt_plugins.checkpoints.folder import FolderFormat, FolderFormatParams

    def broken(params: FolderFormatParams, context: object) -> FolderFormat:
        raise ImportError("no module named acme")

    record = Component("checkpoint_format", "aaa", broken, FolderFormatParams, "broken")

    class Plugin:
        @hookimpl
        def blt_components(self):
            return [record]

    plugins = load_plugins(extra=[("blt-acme", "acme", Plugin())])
    tables = {"schema": 1, "run": {"checkpoint": str(checkpoint)}}
    assert Pipeline.load(Config.from_mapping(tables), plugins).generate("a", max_new_bytes=2)
    tables["run"]["checkpoint"] = "acme://nowhere"
    with pytest.raises(blt_core.CheckpointError, match=r"aaa \(broken: .*no module named acme"):
        Pipeline.load(Config.from_mapping(tables), plugins)


def test_an_abandoned_run_ends_without_a_result():
    seen = []

    class Observer:
        @hookimpl
        def blt_run_end(self, run, result):
            seen.append(result)

    plugins = load_plugins(extra=[("blt-trace", "trace", Observer())])
    pipeline = Pipeline.load(Config.from_mapping(config()), plugins)
    steps = pipeline.steps(["a"], max_new_bytes=5)
    next(steps)
    steps.close()
    [whole] = [list(pipeline.steps(["a"], max_new_bytes=5))]
    assert seen[0] is None
    assert seen[1][0].output == bytes(whole[-1].progress[0].output)
