"""What a program sees of a run: records, steps, signatures, other components, threads."""

from __future__ import annotations

import inspect
import json
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import attrs
import pytest

from blt_core import ConfigError, Cost, Generation, Pipeline, RequestError, Round, Step
from blt_core.cli.app import run
from blt_core.compare import compare
from blt_core.requests import REQUEST_KEYS

VERIFIED = ("ar", "blt-s draft_bytes=5", "speculative drafter.use=cascade drafter.drafter.use=self")
TIMES = ("prefill_seconds", "seconds", "bytes_per_second")


def counted(record):
    return {key: value for key, value in record.items() if key not in TIMES}


# -- records -------------------------------------------------------------------------------------


def test_a_record_is_what_the_command_line_prints(pipeline, checkpoint, tmp_path, capsysbinary):
    (tmp_path / "run.toml").write_text(f'schema = 1\n[run]\ncheckpoint = "{checkpoint}"\n')
    asked = ("--max-new-bytes", "20", "--temperature", "0.7", "--seed", "3", "--stop", "e")
    command = ("generate", str(tmp_path / "run.toml"), "--prompt", "ab", "--json", *asked)
    assert run([*command, "--sampler", "blt-s draft_bytes=4"]) == 0
    printed = json.loads(capsysbinary.readouterr().out)
    request = {"max_new_bytes": 20, "temperature": 0.7, "seed": 3, "stop": "e"}
    record = pipeline.with_sampler("blt-s draft_bytes=4").generate("ab", **request).to_dict()
    assert list(record) == list(printed)
    assert counted(record) == counted(printed)
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_a_record_is_of_values_that_json_can_spell(pipeline):
    class Exact:
        """Prices in fractions, which are numbers and no JSON."""

        def cost(self, passes, parameters):
            return Cost(Fraction(passes.decoder, 4), {})

    priced = pipeline.with_sampler("ar")
    priced.cost_model = Exact()
    result = priced.generate("a", max_new_bytes=4)
    assert json.loads(json.dumps(result.to_dict()))["gigabytes"] == result.passes.decoder / 4


def test_a_record_of_a_run_that_goes_on_has_no_end(pipeline):
    step = next(pipeline.steps("a", max_new_bytes=9))
    record = pipeline.generation(step.progress[0]).to_dict()
    assert record["stop_reason"] is None
    assert json.loads(json.dumps(record)) == record


# -- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", VERIFIED)
def test_steps_that_are_held_stay_as_they_were(pipeline, sampler):
    fast = pipeline.with_sampler(sampler)
    seen = []
    held = []
    for step in fast.steps(["ab", "import os"], max_new_bytes=25):
        held.append(step)
        seen.append([(p.output, p.ids, p.rounds, p.drafted) for p in step.progress])
    assert seen == [[(p.output, p.ids, p.rounds, p.drafted) for p in s.progress] for s in held]
    assert len(held) > 2
    for row in range(2):
        outputs = [step.progress[row].output for step in held]
        for before, after, step in zip(outputs, outputs[1:], held[1:], strict=False):
            assert after == before + step.new[row]
        assert outputs[-1] == fast.generate(["ab", "import os"], max_new_bytes=25)[row].output
    assert held[0].progress[0] is not held[-1].progress[0]
    assert held[0].progress[0].output != held[-1].progress[0].output


def test_a_step_tells_the_round_of_its_sampler(pipeline):
    fast = pipeline.with_sampler("blt-s draft_bytes=5")
    drafted = 0
    for step in fast.steps("hello", max_new_bytes=30):
        assert isinstance(step, Step)
        assert isinstance(step.round, Round)
        assert bytes(step.round.ids[0][: len(step.new[0])]) == step.new[0]
        drafted += step.round.drafted[0]
        assert step.progress[0].drafted == drafted
    assert drafted > 0
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        step.new = ()


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generate", "stream", "stream_text", "steps", "check"])
def test_signatures_show_the_settings_of_a_request(pipeline, name):
    unbound = inspect.signature(getattr(Pipeline, name)).parameters
    bound = inspect.signature(getattr(pipeline, name)).parameters
    assert list(unbound)[2:] == list(bound)[1:] == list(REQUEST_KEYS)
    for key in REQUEST_KEYS:
        assert bound[key].kind is inspect.Parameter.KEYWORD_ONLY
    assert set(REQUEST_KEYS) < set(inspect.signature(compare).parameters)


def test_every_way_to_ask_refuses_what_is_no_setting_before_the_first_round(pipeline):
    for ask in (pipeline.generate, pipeline.stream, pipeline.stream_text, pipeline.steps):
        with pytest.raises(RequestError, match=r"stopp: no such request setting.*'stop'"):
            ask("a", stopp=None)
    with pytest.raises(RequestError, match="stopp"):
        compare(pipeline, {"ar": "ar"}, ["a"], stopp="x")


# -- other components ----------------------------------------------------------------------------


def test_another_cost_model_prices_the_same_passes(pipeline):
    half = pipeline.with_cost_model("bandwidth bytes_per_parameter=1")
    table = pipeline.with_cost_model({"use": "bandwidth", "bytes_per_parameter": 1})
    whole = pipeline.generate("ab", max_new_bytes=8)
    for other in (half, table):
        assert (other.model, other.sampler) == (pipeline.model, pipeline.sampler)
        assert other.generate("ab", max_new_bytes=8).cost.gigabytes == whole.cost.gigabytes / 2
    assert pipeline.generate("ab", max_new_bytes=8).cost == whole.cost
    with pytest.raises(ConfigError, match="Did you mean 'bandwidth'"):
        pipeline.with_cost_model("bandwith")


def test_assigned_objects_outlast_another_component(pipeline):
    class Free:
        """Prices nothing."""

        def cost(self, passes, parameters):
            return Cost(0.0, {})

    own = pipeline.with_sampler("ar")
    own.cost_model = Free()
    fast = own.with_sampler("blt-s")
    assert fast.cost_model is own.cost_model
    assert fast.generate("a", max_new_bytes=4).cost.gigabytes == 0
    assert pipeline.cost_model is not own.cost_model
    own.sampler = fast.sampler
    assert own.with_cost_model("bandwidth").sampler is fast.sampler


def test_a_pipeline_shows_what_it_is_made_of(pipeline, checkpoint):
    shown = repr(pipeline.with_sampler("blt-s draft_bytes=3"))
    assert shown.startswith(f"Pipeline(model={str(checkpoint)!r}, sampler='blt-s', ")
    assert "cost_model='bandwidth'" in shown
    assert f"parameters={sum(attrs.astuple(pipeline.parameter_counts)):_})" in shown
    own = pipeline.with_sampler("ar")
    own.sampler = type("Mine", (), {})()
    assert "sampler='Mine'" in repr(own)
    assert "sampler='blt-s'" in repr(own.with_sampler("blt-s"))


# -- batches and threads -------------------------------------------------------------------------

PROMPTS = ["", "a", b"\xff\x00", "import os", "caf\u00e9"]
DRAWN = {"max_new_bytes": 12, "temperature": 0.8, "top_p": 0.9, "seed": 5}


def counts(result):
    left_out = {"cost", *TIMES}
    return {k: v for k, v in attrs.asdict(result, recurse=False).items() if k not in left_out}


@pytest.mark.parametrize("sampler", VERIFIED)
def test_one_pipeline_serves_threads_and_batches_like_single_prompts(pipeline, sampler):
    fast = pipeline.with_sampler(sampler)
    single = [fast.generate(prompt, **DRAWN) for prompt in PROMPTS]
    assert all(isinstance(each, Generation) for each in single)
    with ThreadPoolExecutor(3) as pool:
        side_by_side = list(pool.map(lambda prompt: fast.generate(prompt, **DRAWN), PROMPTS))
    batch = fast.generate(PROMPTS, **{**DRAWN, "seed": [5] * len(PROMPTS)})
    for found in (side_by_side, batch):
        assert list(map(counts, found)) == list(map(counts, single))


@pytest.mark.parametrize("sampler", VERIFIED[1:])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_verified_samplers_give_the_bytes_of_ar_at_any_temperature(pipeline, sampler, temperature):
    request = {**DRAWN, "temperature": temperature}
    fast = pipeline.with_sampler(sampler)
    for prompt in PROMPTS:
        want, got = pipeline.generate(prompt, **request), fast.generate(prompt, **request)
        assert (got.ids, got.stop_reason) == (want.ids, want.stop_reason)


def test_a_preset_keeps_its_name_beside_another_cost_model(pipeline):
    both = pipeline.with_sampler("blt-s").with_cost_model("bandwidth bytes_per_parameter=1")
    assert both.sampler_name == "blt-s"
    assert "sampler='blt-s'" in repr(both)
