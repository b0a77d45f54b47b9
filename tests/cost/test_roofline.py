"""The roofline: prices by hand, and which calibration is taken."""

from __future__ import annotations

import json
import math

import attrs
import pytest
import torch

from blt_core import compiling, loading
from blt_core.component import BuildContext
from blt_core.errors import DataError, RunError
from blt_core.evaluation.protocol import Answer
from blt_core.evaluation.store import from_record, to_record
from blt_core.pipeline import Pipeline
from blt_core.types import Parameters, Passes, RoundCounts, Shape, Shapes
from blt_plugins.cost import measuring, probing
from blt_plugins.cost.calibration import (
    PARTS,
    Calibration,
    Curve,
    Machine,
    PartTimes,
    folder,
    read,
    save,
)
from blt_plugins.cost.measuring import best_rates, measure, part_times
from blt_plugins.cost.probing import Sample
from blt_plugins.cost.roofline import Roofline, RooflineParams
from blt_plugins.drafting.forecast import Price, Prices
from tests.tiny import write_checkpoint

SIZES = Parameters(decoder=1000, encoder=100, global_model=5000, scorer=200, tables=9)


def calibration(**changes) -> Calibration:
    """Reads 1 MB/s and computes 1 MFLOP/s: a row of n parameters takes no less than 4n µs."""
    parts = {part: PartTimes(weight_bytes=4) for part in PARTS}
    # Read in 4 ms; products take 2 ms a row, so that from 2 rows on they decide.
    parts["decoder"] = PartTimes(Curve(((1, 0.005), (3, 0.009))), 1e-6, 4)
    found = Calibration(
        machine=Machine.here("cpu", "float32"),
        source="by hand",
        parameters=SIZES,
        bandwidth=1e6,
        flops=1e6,
        parts=parts,
        rounds=Curve(((1, 0.002), (9, 0.010))),
        draft=0.001,
    )
    return attrs.evolve(found, **changes)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "blt-core" / "roofline"


def price(passes, sizes=SIZES, **keys):
    return Roofline(RooflineParams(**keys), BuildContext(dtype="float32")).cost(passes, sizes)


def test_a_curve_is_straight_between_its_points_and_level_before_them():
    curve = Curve(((2, 1.0), (4, 3.0), (8, 2.0)))
    assert [curve.at(rows) for rows in (1, 2, 3, 4, 6, 8)] == [1.0, 1.0, 2.0, 3.0, 2.5, 2.0]
    assert curve.at(16) == 2.0  # never less than at its end
    assert Curve(((2, 1.0), (4, 3.0))).at(9) == 8.0
    assert Curve(((5, 7.0),)).at(1) == Curve(((5, 7.0),)).at(50) == 7.0
    assert Curve().at(3) == 0.0


def test_passes_take_their_roofline_their_overhead_and_what_stands_before_them(cached):
    save(calibration())
    shape = Shape(((1, 10), (2, 3), (5, 1)), 400)
    found = price(Passes(decoder=14, shapes=Shapes(decoder=shape)))
    # Overheads: 5 - 4 ms at one row, 9 - 6 ms at three; so 2 ms at two, and 5 ms at five.
    want = 10 * (0.004 + 0.001) + 3 * (0.004 + 0.002) + (0.010 + 0.005) + 400e-6
    assert found.lines["decoder"] == pytest.approx(want)
    assert found.lines["engine"] == pytest.approx(14 * 0.001)
    assert found.total == pytest.approx(sum(found.lines.values()))
    assert (found.unit, found.gigabytes, dict(found.apart)) == ("s", None, {})


def test_passes_without_a_shape_are_of_one_row(cached):
    save(calibration())
    told = Shapes(Shape(((1, 3),)), Shape(), Shape(((1, 4),)), Shape(((1, 2),)), Shape(((1, 3),)))
    counts = {"decoder": 3, "encoder": 2, "encoder_bytes": 4, "scorer": 3}
    found = price(Passes(**counts))
    assert found == price(Passes(**counts, shapes=told))
    assert found.lines["global_model"] == pytest.approx(2 * 4 * 5000 / 1e6)
    assert found.lines["encoder"] == pytest.approx(4 * 4 * 100 / 1e6)
    assert found.lines["scorer"] == pytest.approx(3 * 4 * 200 / 1e6)
    assert found.lines["engine"] == pytest.approx(3 * 0.002)


def test_another_model_has_the_overheads_of_the_one_that_is_nearest(cached):
    save(calibration())
    big = attrs.evolve(SIZES, decoder=10**6)
    parts = {part: PartTimes() for part in PARTS}
    save(calibration(parameters=big, parts=parts))
    bigger = attrs.evolve(SIZES, decoder=2 * 10**6)
    assert price(Passes(decoder=1), bigger).lines["decoder"] == pytest.approx(8.0)
    smaller = attrs.evolve(SIZES, decoder=500)
    assert price(Passes(decoder=1), smaller).lines["decoder"] == pytest.approx(0.002 + 0.001)


def test_drafts_are_as_long_as_they_pay_in_seconds(cached):
    save(calibration())
    roofline = Roofline(RooflineParams(), BuildContext(dtype="float32"))
    prices = Prices.of(Price(roofline, SIZES), patch_bytes=4.0, longest=8)
    one = price(Passes(decoder=1, shapes=Shapes(decoder=Shape(((1, 1),)))))
    assert prices.draft == one.total == 0.005 + 0.001
    # Nine rows: past the last width that was measured, arithmetic is what passes wait for.
    nine = Shape(((9, 1),))
    shapes = Shapes(decoder=nine, scorer=nine)
    verified = price(Passes(decoder=1, scorer=1, shapes=shapes)).total
    assert prices.verify[8] == verified > 3 * prices.verify[0]
    assert prices.by_rows


def test_a_draft_model_is_read_and_has_the_overheads_of_passes(cached):
    save(calibration())
    found = price(Passes(draft=3, draft_parameters=1000)).lines["draft_model"]
    assert found == pytest.approx(4 * 1000 / 1e6 + 3 * (0.001 + 0.001))


@pytest.mark.parametrize(
    "changed", [{"threads": 99}, {"torch": "1.0"}, {"cpu": "another"}, {"device": "H200"}]
)
def test_what_was_measured_elsewhere_is_not_taken(cached, changed):
    save(calibration(machine=attrs.evolve(Machine.here("cpu", "float32"), **changed)))
    with pytest.raises(DataError, match="fix: blt calibrate-cost SOURCE"):
        price(Passes())


def test_dtype_is_that_of_the_run_or_the_key_or_else_any(cached):
    save(calibration(machine=Machine.here("cpu", "bfloat16")))
    with pytest.raises(DataError, match="float32"):
        price(Passes())
    assert price(Passes(), dtype="bfloat16").total == 0
    assert Roofline(RooflineParams(), BuildContext()).cost(Passes(), SIZES).total == 0


def test_passes_that_are_run_in_another_way_are_priced_by_those_that_are_run_so(cached):
    plain, other = (Machine.here("cpu", "float32", variant) for variant in ("", "compiled"))
    save(calibration(machine=plain, draft=0.5))
    save(calibration(machine=other, draft=0.25))
    found = {
        variant: Roofline(RooflineParams(), BuildContext(variant=variant)).calibration(SIZES).draft
        for variant in ("", "compiled")
    }
    assert found == {"": 0.5, "compiled": 0.25}
    nowhere = Roofline(RooflineParams(), BuildContext(variant="measured kernels"))
    with pytest.raises(DataError, match="measured kernels"):
        nowhere.calibration(SIZES)
    anywhere = Roofline(RooflineParams(), BuildContext())
    assert anywhere.calibration(SIZES).draft == 0.5


def test_where_nothing_runs_passes_count_that_are_run_as_by_default(cached, monkeypatch):
    for variant, draft in (("", 0.5), ("measured kernels", 0.25)):
        save(calibration(machine=Machine.here("cpu", "float32", variant), draft=draft))
    for kernels, draft in (("fixed", 0.5), ("measured", 0.25)):
        monkeypatch.setenv("BLT_KERNELS", kernels)
        assert Roofline(RooflineParams(), BuildContext()).calibration(SIZES).draft == draft


def test_where_nothing_runs_another_variant_is_better_than_none(cached):
    save(calibration(machine=Machine.here("cpu", "float32", "compiled"), draft=0.25))
    assert Roofline(RooflineParams(), BuildContext()).calibration(SIZES).draft == 0.25


def test_what_was_stored_before_there_were_variants_is_replaced(cached):
    tables = calibration(draft=0.5).to_json()
    del tables["machine"]["variant"]
    path = save(calibration())
    path.write_text(json.dumps(tables))
    assert read(path).machine == calibration().machine
    assert save(calibration()) == path


def test_a_file_is_taken_whatever_machine_it_is_of(cached, tmp_path):
    far = attrs.evolve(Machine.here("cpu", "float32"), cpu="another")
    path = save(calibration(machine=far), tmp_path / "there.json")
    assert read(path) == calibration(machine=far)
    assert not cached.exists()
    found = price(Passes(decoder=1, scorer=1), file=str(path))
    assert found.lines["engine"] == pytest.approx(0.002)


def test_saving_again_replaces_what_was_stored(cached):
    assert save(calibration()) == save(calibration(draft=0.5))
    assert [each.name for each in folder().iterdir()] == [save(calibration()).name]


def test_a_foreign_file_among_those_that_are_kept_is_passed_over(cached, capsys):
    save(calibration())
    (folder() / "a.json").write_text('{"format": 7}')
    assert price(Passes(decoder=1)).total > 0
    assert "a.json: no calibration of format 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "no calibration of format 1"),
        ('{"format": 7}', "no calibration of format 1"),
        ('{"format": 1}', "machine"),
        (None, "No such file"),
        ({"bandwidth": -1.0}, "finite"),
        ({"bandwidth": 0.0}, "finite"),
        ({"rounds": {"points": [[2, 1.0], [2, 1.0]]}}, "ascend"),
        ({"parts": {}}, "its parts are"),
        ({"parts": []}, "not read as"),
        ({"bandwidth": 5e-324}, "1 or more"),
        ({"parameters": {"decoder": -5, "encoder": 1, "global_model": 1}}, "finite"),
    ],
)
def test_what_is_no_calibration_is_refused_by_name(cached, tmp_path, text, said):
    path = tmp_path / "given.json"
    if isinstance(text, dict):
        text = json.dumps({**calibration().to_json(), **text})
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        price(Passes(), file=str(path))
    assert str(path) in str(caught.value)
    assert "blt calibrate-cost" in str(caught.value)


def test_kept_answers_have_the_shapes_of_their_passes_and_older_ones_have_none():
    passes = Passes(3, 2, shapes=Shapes(decoder=Shape(((1, 2), (5, 1)), 30)))
    answer = Answer((b"x",), ("eos",), passes, 0, 0, RoundCounts(), 1.0)
    record = json.loads(json.dumps(to_record("key", answer)))
    assert from_record(record) == answer
    del record["passes"]["shapes"]
    assert from_record(record).passes == Passes(3, 2)


def test_medians_of_passes_give_what_rows_and_context_take():
    near = [Sample(1, 100, 0.3 + extra) for extra in (0.0, 0.1, -0.1)]
    near += [Sample(4, 100, 0.7)] * 3
    far = [Sample(1, 1100, 0.8)] * 3
    prompts = [Sample(2, 0, 9.0), Sample(64, 0, 3.0)]
    found = part_times(near, far, prompts, 2)
    assert found.context == pytest.approx(0.0005)
    # The pass over 2 rows is among those of few rows already measured; that over 64 goes beyond.
    rows, seconds = zip(*found.alone.points, strict=True)
    assert rows == (1, 4, 64)
    assert seconds == pytest.approx((0.25, 0.65, 3.0))
    assert part_times(near, [Sample(1, 1100, 0.1)], [], 2).context == 0


def test_no_roofline_lies_below_a_pass_that_was_measured():
    parts = {
        "decoder": PartTimes(Curve(((1, 0.5), (9, 0.6))), 0.0, 2),
        "global_model": PartTimes(Curve(((1, 4.0), (3, 0.0)))),
    }
    # 2 bytes of 1,000 parameters in 0.5 s, 4 of 5,000 in 4 s; 2 operations a parameter and row.
    assert best_rates(parts, SIZES) == pytest.approx((5000.0, 2 * 1000 * 9 / 0.6))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    return Pipeline.from_config({"schema": 1, "run": {"checkpoint": str(path)}})


@pytest.mark.parametrize(
    ("run", "variant"),
    [
        ({}, ""),
        ({"dtype": "float64"}, ""),
        ({"dtype": "bfloat16"}, ""),
        ({"scorer_dtype": "float32"}, ""),
        ({"scorer_dtype": "bfloat16"}, "bfloat16 scorer"),
        ({"dtype": "float64", "scorer_dtype": "float32"}, "float32 scorer"),
        ({"kernels": "measured"}, "measured kernels"),
        ({"kernels": "measured", "compile": True}, "measured kernels, compiled"),
    ],
)
def test_a_variant_says_how_passes_are_run(pipeline, cached, monkeypatch, run, variant):
    def compile_passes(module, device):
        for part in module.modules():
            if hasattr(part, "compiles"):
                part.compiles = object()

    monkeypatch.setattr(loading, "compile_passes", compile_passes)
    tables = {"schema": 1, "run": {"checkpoint": pipeline.settings.checkpoint, **run}}
    assert Pipeline.from_config(tables).model.variant == variant


def test_passes_that_no_compiler_was_there_for_are_not_told_as_compiled(pipeline, monkeypatch):
    monkeypatch.setattr(compiling, "_missing", lambda device: "no compiler")
    tables = {"schema": 1, "run": {"checkpoint": pipeline.settings.checkpoint, "compile": True}}
    assert Pipeline.from_config(tables).model.variant == ""


@pytest.fixture
def quick(monkeypatch):
    """As few passes as can be."""
    monkeypatch.setattr(probing, "SECONDS", 0.0)
    monkeypatch.setattr(probing, "PROMPT_TURNS", 1)
    monkeypatch.setattr(measuring, "SLOW", math.inf)


def test_single_passes_of_a_model_are_measured_and_leave_it_as_it_was(pipeline, quick, cached):
    before = pipeline.generate(b"some text", max_new_bytes=20)
    found = measure(pipeline, "tiny", lambda: None)
    after = pipeline.generate(b"some text", max_new_bytes=20)
    assert (after.output, after.passes) == (before.output, before.passes)
    assert found.machine == Machine.here("cpu", "float32")
    assert found.parameters == pipeline.parameter_counts
    assert found.machine.threads == torch.get_num_threads()
    widths = [rows for rows, _ in found.parts["decoder"].alone.points]
    # Besides, prompts of several lengths: BOS and their bytes.
    assert widths == [*probing.WIDTHS, 38, 63, 151]
    assert [rows for rows, _ in found.rounds.points] == list(probing.WIDTHS)
    assert all(s > 0 for part in PARTS[2:] for _, s in found.parts[part].alone.points)
    assert found.parts["blocks"].alone.points == ()  # the decoder does not denoise
    assert read(save(found)) == found
    priced = pipeline.with_cost_model("roofline").price(before.passes)
    assert priced.unit == "s"
    assert priced.lines["global_model"] == found.seconds(
        "global_model", found.parameters.global_model, before.passes.shapes.global_model
    )


def test_of_compiled_passes_all_kinds_run_before_any_is_timed(pipeline, quick, monkeypatch):
    ran, plain = [], measuring.run

    def watched(pipeline, before, turns, seconds, watch):
        ran.append((tuple(turns), seconds))
        return plain(pipeline, before, turns, seconds, watch)

    monkeypatch.setattr(measuring, "run", watched)
    monkeypatch.setattr(probing, "SECONDS", 1e-9)
    measure(pipeline, "tiny", lambda: None)
    timed = [*ran]
    assert [seconds > 0 for _, seconds in timed] == [True, True]
    ran.clear()
    run = attrs.evolve(pipeline.plan.run, compile=True)
    monkeypatch.setattr(Pipeline, "settings", property(lambda _: run))
    measure(pipeline, "tiny", lambda: None)
    assert ran == [*((turns, 0.0) for turns, _ in timed), *timed]


def test_a_part_that_passes_do_not_go_through_is_named(pipeline, quick, monkeypatch):
    model = pipeline.model
    plain = type(model.encoder).byte_states
    # As a compiled part may be: the engine calls something else than the method.
    monkeypatch.setattr(probing.Clock, "read", lambda *_: lambda *_: None)
    with pytest.raises(RunError, match="encoder, scorer cannot be timed"):
        measure(pipeline, "tiny", lambda: None)
    assert type(model.encoder).byte_states is plain
    assert "byte_states" not in vars(model.encoder)
