"""Choices: measured once, kept, sticky; what a file may say; what a run reports."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from blt_core.errors import ConfigError, DataError
from blt_core.kernels import measuring, using
from blt_core.kernels.candidates import KERNELS, ROW_CLASSES
from blt_core.kernels.choice import Choice, name_of, read_choice, stored_at
from blt_core.kernels.measuring import measure, spread
from blt_core.kernels.using import copied_bytes, setting_elsewhere, use_kernels, weights_of
from blt_core.nn import Linear
from blt_core.pipeline import Pipeline
from blt_core.wiring.config import RunSettings
from tests.tiny import write_checkpoint

NAME = "float32 8x8"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache folder of its own, and little to read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "last_level_cache", lambda: 1 << 14)
    monkeypatch.setattr(using, "_unstored", {})
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(Linear(24, 40), Linear(40, 24), Linear(24, 40)).to(dtype)


def chosen(before, **times):
    names = {} if before is None else {NAME: {"1": before}}
    return Choice(names).changed_by({NAME: {"1": times}}).names[NAME]["1"]


def test_another_kernel_is_chosen_where_it_is_clearly_faster():
    assert chosen(None, linear=1.0, native=0.8) == "native"
    assert chosen(None, linear=1.0, native=0.95) == "linear"
    assert chosen("native", linear=0.95, native=1.0) == "native"
    assert chosen("native", linear=0.8, native=1.0) == "linear"
    assert chosen("native", linear=1.0) == "linear"  # it is not there any more


def test_a_copy_has_to_be_clearly_faster_than_what_needs_none():
    assert chosen(None, linear=1.0, native=0.8, columns=0.75) == "native"
    assert chosen(None, linear=1.0, native=0.8, columns=0.6) == "columns"


def test_a_choice_is_measured_once_and_kept(monkeypatch, cache):
    first = use_kernels(model(), "measured")
    [path] = (cache / "blt-core" / "kernels").glob("choice-*.json")
    assert path == stored_at()
    assert set(read_choice(path)[0].names) == {"float32 40x24", "float32 24x40"}
    monkeypatch.setattr(using, "measure", lambda *_, **__: pytest.fail("measured again"))
    module = model()
    assert use_kernels(module, "measured") == first
    assert all(hasattr(layer.weight, "kernels") for layer in module)


def test_what_there_is_no_time_for_is_by_fixed_rule_from_then_on(monkeypatch):
    monkeypatch.setattr(using, "BUDGET", -1.0)
    choice = use_kernels(model(torch.bfloat16), "measured")
    found = read_choice(stored_at())[0]
    rule = {"1": "mv", "2-4": "linear", "5-16": "linear", "more": "linear"}
    assert found.names == {f"bfloat16 {size}": rule for size in ("40x24", "24x40")}
    monkeypatch.setattr(using, "BUDGET", 9.0)
    assert use_kernels(model(torch.bfloat16), "measured") == choice


def test_other_threads_have_another_choice():
    before, path = torch.get_num_threads(), stored_at()
    torch.set_num_threads(before + 1)
    try:
        assert stored_at() != path
    finally:
        torch.set_num_threads(before)


def test_measuring_meets_every_candidate_and_more_bytes_than_the_cache_holds(monkeypatch):
    monkeypatch.setattr(measuring, "last_level_cache", lambda: 1 << 20)
    weights = weights_of(model())
    many = spread(weights)
    assert sum(w.nbytes for each in many.values() for w in each) > 1 << 20
    addresses = [w.data_ptr() for each in many.values() for w in each]
    assert len(set(addresses)) == len(addresses)
    seen = []
    times = measure(many, watch=lambda done, total: seen.append((done, total)))
    for classes in times.values():
        for rows_class, rows in ROW_CLASSES.items():
            able = {k.name for k in KERNELS.values() if k.fits(torch.ones(4, 4), rows)}
            assert set(classes[rows_class]) == able
            assert all(0 < seconds < math.inf for seconds in classes[rows_class].values())
    assert seen[-1][0] == seen[-1][1]
    assert measure(many, budget=-1.0) == {}


def test_of_large_weights_rows_are_measured_that_exceed_the_cache_in_all(monkeypatch):
    monkeypatch.setattr(measuring, "last_level_cache", lambda: 1 << 20)
    weights = {
        "large": [torch.ones(8192, 256), torch.ones(8192, 256)],
        "small": [torch.ones(100, 256) for _ in range(9)],
    }
    [some], small = spread(weights, cut=True).values()
    assert some.data_ptr() == weights["large"][0].data_ptr()
    assert some.is_contiguous()
    assert some.shape == (640, 256)
    assert [each.shape for each in small] == [(100, 256)] * 7
    assert some.nbytes + sum(each.nbytes for each in small) < 1.5 * (1 << 20)
    assert [len(each) for each in spread(weights)["large"]] == [8192]


def test_a_broken_stored_choice_is_measured_again(capsys):
    use_kernels(model(), "measured")
    stored_at().write_text('{"schema": 1, "names"')
    assert use_kernels(model(), "measured")
    assert "measured again" in capsys.readouterr().err
    assert read_choice(stored_at())[0].names


def test_a_choice_that_cannot_be_stored_serves_all_the_same(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    first = use_kernels(model(), "measured")
    assert "cannot be stored" in capsys.readouterr().err
    monkeypatch.setattr(using, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert use_kernels(model(), "measured") == first
    assert not capsys.readouterr().err


def test_kernels_are_measured_unless_a_config_or_the_environment_says_otherwise(monkeypatch):
    assert RunSettings().kernels == "fixed"  # what tests/conftest.py asks for
    assert RunSettings(kernels="measured").kernels == "measured"
    monkeypatch.setenv("BLT_KERNELS", "")
    assert RunSettings().kernels == "measured"
    monkeypatch.delenv("BLT_KERNELS")
    assert RunSettings().kernels == "measured"


def test_another_process_has_the_choice_that_its_text_tells(monkeypatch, tmp_path):
    first = use_kernels(model(), "measured")
    second = use_kernels(model(), str(pinned(tmp_path)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    with monkeypatch.context() as patch:
        patch.setattr(using, "measure", lambda *_, **__: pytest.fail("measured there"))
        for each in (first, second):
            there = use_kernels(model(), each.text())
            assert (there.digest(), there.text()) == (each.digest(), each.text())
    # What the text does not tell of is measured.
    beside = nn.Sequential(Linear(8, 8), Linear(24, 40))
    found = use_kernels(beside, first.text())
    assert set(found.names) == {"float32 8x8", "float32 40x24"}
    assert found.names["float32 40x24"] == first.names["float32 40x24"]
    assert read_choice(stored_at())[0].names.keys() == {"float32 8x8"}


@pytest.mark.parametrize("setting", ["measured", "file"])
def test_another_process_is_told_of_models_beside_too(monkeypatch, tmp_path, setting):
    if setting == "file":
        setting = str(pinned(tmp_path))
    own = use_kernels(model(), setting)
    draft = use_kernels(nn.Sequential(Linear(8, 8)), setting, beside=True)
    text = setting_elsewhere(setting, own.text())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(using, "measure", lambda *_, **__: pytest.fail("measured there"))
    assert use_kernels(model(), text).text() == own.text()
    there = use_kernels(nn.Sequential(Linear(8, 8)), text, beside=True)
    assert there.text() == draft.text()


def test_a_kernel_that_is_not_there_is_not_passed_over(monkeypatch, tmp_path):
    names = {"float32 40x24": {"1": "linear", "5-16": "onednn"}}
    Choice(names).write(tmp_path / "choice.json")
    monkeypatch.setattr(using, "packs", lambda _: False)
    with pytest.raises(DataError, match="oneDNN's kernel for float32 40x24"):
        use_kernels(model(), str(tmp_path / "choice.json"))


def test_results_tell_the_choice_that_they_were_begun_with(tmp_path):
    path = tmp_path / "out.partial"
    choice = use_kernels(model(), "measured")
    head = {"format": 1, "kernels": json.loads(choice.text())}
    path.write_text(json.dumps(head) + "\n" + json.dumps({"window": 0, "records": []}) + "\n")
    assert use_kernels(model(), str(path)).text() == choice.text()
    found = use_kernels(nn.Sequential(Linear(8, 8), Linear(24, 40)), str(path))
    assert set(found.names) == {"float32 8x8", "float32 40x24"}
    path.write_text(json.dumps(head | {"kernels": None}) + "\n")
    with pytest.raises(DataError, match="begun without one, with kernels = fixed"):
        use_kernels(model(), str(path))


def test_a_native_kernel_counts_only_where_it_is_chosen_for_the_model():
    unused = {"float32 8x8": {"1": "native"}, "float32 40x24": {"1": "linear"}}
    text = Choice(unused, native="0").text()
    assert use_kernels(model(), text).native_used is None
    with pytest.raises(DataError, match=r"\[run\] kernels: chooses the native kernel 0"):
        use_kernels(nn.Sequential(Linear(8, 8)), text)


def test_large_weights_are_not_copied_unless_somebody_asks(monkeypatch):
    seen = []

    def measure(weights, *, without_copies=(), **_):
        seen.append(set(without_copies))
        return {}

    monkeypatch.setattr(using, "measure", measure)
    monkeypatch.setattr(using, "COPIED", 40 * 24 * 4)
    use_kernels(model(), "measured")  # one of 24 x 40, two of 40 x 24
    assert seen == [{"float32 40x24"}]
    times = measuring.measure(spread(weights_of(model())), without_copies={"float32 40x24"})
    tried = {name: set().union(*each.values()) for name, each in times.items()}
    assert not tried["float32 40x24"] & {"onednn", "columns"}
    assert "columns" in tried["float32 24x40"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"\[run\] kernels: no choice of kernels"),
        ('{"schema": 1}', r"\[run\] kernels: no choice of kernels: a part is missing"),
    ],
)
def test_a_text_that_cannot_be_followed_is_refused(text, said):
    with pytest.raises(DataError, match=said):
        use_kernels(model(), text)


def test_copies_are_counted():
    weights = [torch.ones(4, 4), torch.ones(4, 4)]
    assert copied_bytes(weights, {"linear", "native"}) == 0
    assert copied_bytes(weights, {"linear", "columns", "onednn"}) == 2 * 2 * 64


def test_float64_has_nothing_to_choose():
    assert use_kernels(model(torch.float64), "measured") is None
    assert not stored_at().exists()


def pinned(tmp_path, **changes):
    path = tmp_path / "choice.json"
    Choice({name_of(model()[0].weight): {"1": "mv", "2-4": "columns"}}).write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_a_file_pins_a_choice(tmp_path):
    path = pinned(tmp_path)
    choice = use_kernels(model(), str(path))
    assert choice == read_choice(path)[0].filled(weights_of(model()))
    assert choice.digest() != use_kernels(model(), Choice({}).filled(choice.names).text()).digest()
    with torch.no_grad():
        plain, given = model(), model()
        use_kernels(given, str(path))
        x = torch.randn(1, 24)
        assert torch.equal(given[0](x)[0], torch.mv(plain[0].weight, x[0]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 2}, "schema = 1"),
        ({"names": {"float32 40x24": {"1": "fastest"}}}, "'fastest' is unknown"),
        ({"machine": {}}, "a part is missing"),
        ({"names": {"float32 40x24": {"1": "native"}}, "native": "0"}, "blt bench-kernels --build"),
    ],
)
def test_a_file_that_cannot_be_followed_is_refused(tmp_path, changes, said):
    with pytest.raises(DataError, match=said):
        use_kernels(model(), str(pinned(tmp_path, **changes)))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no\.json: no choice of kernels"):
        use_kernels(model(), str(tmp_path / "no.json"))


def load(checkpoint, **run):
    return Pipeline.from_config({"schema": 1, "run": {"checkpoint": str(checkpoint), **run}})


def test_records_tell_the_choice_where_there_is_one(checkpoint):
    plain = load(checkpoint).generate("def f", max_new_bytes=20)
    assert "kernels" not in plain.to_dict()
    pipeline = load(checkpoint, kernels="measured")
    found = pipeline.generate("def f", max_new_bytes=20)
    assert found.to_dict()["kernels"] == pipeline.model.kernels == found.kernels
    again = load(checkpoint, kernels=str(stored_at())).generate("def f", max_new_bytes=20)
    assert (again.kernels, again.output) == (found.kernels, found.output)
    assert load(checkpoint, kernels="measured", dtype="float64").model.kernels is None


def test_each_sampler_equals_ar_with_the_same_choice(checkpoint):
    pipeline = load(checkpoint, kernels="measured")
    prompts = ["def f", "x = [1, 2"]
    want = [each.output for each in pipeline.generate(prompts, max_new_bytes=40)]
    for sampler in ("ar", "blt-s draft_bytes=8"):
        for prompt, output in zip(prompts, want, strict=True):
            found = pipeline.with_sampler(sampler).generate(prompt, max_new_bytes=40)
            assert found.output == output


def test_the_scorer_has_a_dtype_of_its_own(checkpoint):
    def dtypes(**run):
        model = load(checkpoint, **run).model
        parts = model.module_dict()
        return {kind: next(part.parameters()).dtype for kind, part in parts.items()}

    assert dtypes()["patcher"] == torch.float32
    assert dtypes(dtype="bfloat16")["patcher"] == torch.float32
    half = dtypes(dtype="bfloat16", scorer_dtype="bfloat16")
    assert set(half.values()) == {torch.bfloat16}
    mixed = dtypes(dtype="float64", scorer_dtype="float32")
    assert (mixed["patcher"], mixed["decoder"]) == (torch.float32, torch.float64)
    with pytest.raises(ConfigError, match="scorer_dtype"):
        load(checkpoint, scorer_dtype="float16")


def test_a_scorer_in_half_precision_gives_entropies_in_single(checkpoint):
    from blt_core.types import Rows

    ids = torch.tensor([[256, *b"def fibonacci(n):"]])
    rows = Rows(ids, (ids.shape[1],))
    exact = load(checkpoint).model.patcher.entropies(rows)
    half = load(checkpoint, scorer_dtype="bfloat16").model.patcher.entropies(rows)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.05
    assert load(checkpoint, scorer_dtype="bfloat16").generate("def f", max_new_bytes=20).output
