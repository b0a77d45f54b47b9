"""Files of items: records in their order, the same however often a run is stopped."""

from __future__ import annotations

import base64
import contextlib
import json
import tracemalloc
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from blt_core.batch_inference import WINDOW, _run, generate_file, score_file
from blt_core.errors import ComponentError, DataError, RequestError
from blt_core.execution import torch_threads
from blt_core.kernels.candidates import ROW_CLASSES
from blt_core.kernels.choice import Choice
from blt_core.kernels.using import weights_of
from blt_core.pipeline import Pipeline
from tests.nightly import nightly_or

PROMPTS = ["abcdef", "a", "xyz " * 5, "", "q", "abc", "hello there"]


@pytest.fixture(scope="module")
def config(checkpoint):
    run = {"checkpoint": str(checkpoint), "max_new_bytes": 9, "temperature": 1.0, "seed": 5}
    return {"schema": 1, "run": run, "sampler": {"use": "blt-s"}}


@pytest.fixture(scope="module")
def pipeline(config):
    return Pipeline.from_config(config)


@pytest.fixture
def items(tmp_path):
    def write(records, name="items.jsonl"):
        lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def counted(path):
    """Records without wall-clock figures."""
    times = {"prefill_seconds", "seconds", "bytes_per_second"}
    return [{k: v for k, v in each.items() if k not in times} for each in records(path)]


@pytest.mark.parametrize("batch", [1, 3])
def test_records_are_those_of_one_call_in_the_order_of_the_items(pipeline, items, tmp_path, batch):
    path = items([{"prompt": text, "id": f"n{at}"} for at, text in enumerate(PROMPTS)])
    outcome = generate_file(pipeline, path, tmp_path / "out.jsonl", batch=batch)
    found = records(tmp_path / "out.jsonl")
    assert (outcome.items, outcome.failed) == (len(PROMPTS), 0)
    assert [(each["index"], each["id"]) for each in found] == [
        (at, f"n{at}") for at in range(len(PROMPTS))
    ]
    for each, wanted in zip(found, pipeline.generate(PROMPTS), strict=True):
        assert base64.b64decode(each["bytes_base64"]) == wanted.output
        assert (each["seed"], each["n_dec"]) == (wanted.seed, wanted.passes.decoder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["items.jsonl", "out.jsonl"]


def test_bytes_samples_and_log_probabilities(pipeline, items, tmp_path):
    raw = base64.b64encode(b"\xff\x00").decode()
    path = items([{"prompt_base64": raw}, {"prompt": "ab"}])
    generate_file(pipeline, path, tmp_path / "out", batch=4, samples=2, logprobs=0)
    found = records(tmp_path / "out")
    assert [(each["index"], each["sample"]) for each in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    wanted = pipeline.generate([b"\xff\x00", b"ab"], samples=2)
    assert [each["ids"] for each in found] == [list(each.ids) for each in wanted]
    assert all(len(each["logprobs"]) == len(each["ids"]) for each in found)


def test_an_item_that_cannot_be_served_has_an_error_and_the_rest_go_on(pipeline, items, tmp_path):
    wrong = ["{", "[1]", {"text": "a"}, {"prompt": 3, "id": "x"}, {"prompt_base64": "%"}, ""]
    wrong += [{"prompt": "a", "prompt_base64": ""}, {"prompt": "a" * 10_000}]
    path = items([{"prompt": "ab"}, *wrong, {"prompt": "cd"}])
    outcome = generate_file(pipeline, path, tmp_path / "out", batch=3)
    found = records(tmp_path / "out")
    assert [each["index"] for each in found] == list(range(len(wrong) + 2))
    assert ["error" in each for each in found] == [False, *[True] * len(wrong), False]
    assert found[4]["id"] == "x"
    assert (outcome.failed, outcome.first) == (len(wrong), f"line 2: {found[1]['error']}")


def test_a_batch_that_fails_is_tried_item_by_item(pipeline, items, tmp_path, monkeypatch):
    generate = Pipeline.generate

    def failing(self, prompts, **request):
        if b"bad" in prompts:
            raise RequestError("not this one")
        return generate(self, prompts, **request)

    monkeypatch.setattr(Pipeline, "generate", failing)
    path = items([{"prompt": text} for text in ("abc", "bad", "cde")])
    generate_file(pipeline, path, tmp_path / "out", batch=3)
    assert [each.get("error") for each in records(tmp_path / "out")] == [None, "not this one", None]


def test_an_id_may_be_text_that_utf_8_cannot_spell(pipeline, items, tmp_path):
    path = items(['{"prompt": "a", "id": "\\ud800"}', '{"prompt": "\\ud800", "id": 2}'])
    assert generate_file(pipeline, path, tmp_path / "out").failed == 1
    assert [each["id"] for each in records(tmp_path / "out")] == ["\ud800", 2]


def test_a_damaged_batch_is_made_again(pipeline, items, tmp_path):
    path, out = items([{"prompt": text} for text in PROMPTS]), tmp_path / "out"
    with pytest.raises(Stopped):
        generate_file(pipeline, path, out, batch=2, watch=stop_after(2))
    partial = tmp_path / "out.partial"
    head, first, *_ = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(head + first + b"{\n" + b'{"records": [[]]}\n')
    generate_file(pipeline, path, out, batch=2)
    assert [each["index"] for each in records(out)] == list(range(len(PROMPTS)))


class Stopped(BaseException):
    """What ends a run early."""


def stop_after(count):
    def watch(done, _total):
        nonlocal count
        count -= 1
        if count < 0:
            raise Stopped

    return watch


#: After how many batches, and how many bytes are lost; all pairs in a nightly run.
STOPS = nightly_or(
    [(0, 0), (0, 30), (1, 1), (2, 30), (3, 0), (4, 1)],
    [(stops, torn) for stops in range(5) for torn in (0, 1, 30)],
)


@pytest.mark.parametrize(("stops", "torn"), STOPS)
def test_a_run_that_was_stopped_goes_on_to_the_same_records(
    pipeline, items, tmp_path, stops, torn, monkeypatch
):
    monkeypatch.setattr("blt_core.batch_inference.WINDOW", 2)
    path = items([{"prompt": text} for text in [*PROMPTS, "z"]] + ["{"])
    whole, out = tmp_path / "whole", tmp_path / "out"
    generate_file(pipeline, path, whole, batch=2)
    with pytest.raises(Stopped):
        generate_file(pipeline, path, out, batch=2, watch=stop_after(stops))
    partial = tmp_path / "out.partial"
    data = partial.read_bytes()
    partial.write_bytes(data[: len(data) - torn])
    asked = []
    generate = Pipeline.generate
    monkeypatch.setattr(
        Pipeline,
        "generate",
        lambda self, prompts, **given: asked.append(prompts) or generate(self, prompts, **given),
    )
    assert not out.exists()
    generate_file(pipeline, path, out, batch=2)
    assert counted(out) == counted(whole)
    assert not partial.exists()
    kept = stops + 1 - (torn > 0)  # of four batches, and one of what cannot be served
    assert len(asked) == max(4 - kept, 0)


def test_what_was_begun_otherwise_is_not_gone_on_with(pipeline, items, tmp_path):
    path, out = items([{"prompt": text} for text in PROMPTS]), tmp_path / "out"
    with pytest.raises(Stopped):
        generate_file(pipeline, path, out, batch=2, watch=stop_after(1))
    kept = (tmp_path / "out.partial").read_bytes()
    other = items([{"prompt": text} for text in PROMPTS[1:]], "other.jsonl")
    greedy = pipeline.with_sampler("ar")
    for run in (
        lambda: generate_file(pipeline, path, out, batch=3),
        lambda: generate_file(pipeline, other, out, batch=2),
        lambda: generate_file(greedy, path, out, batch=2),
        lambda: generate_file(pipeline, path, out, batch=2, samples=2),
        lambda: score_file(pipeline, path, out, batch=2),
    ):
        with pytest.raises(DataError, match="was begun with other settings"):
            run()
        assert (tmp_path / "out.partial").read_bytes() == kept


def test_a_run_goes_on_with_as_many_threads_as_it_was_begun_with(config, pipeline, items, tmp_path):
    path, out = items([{"prompt": text} for text in PROMPTS]), tmp_path / "out"
    with torch_threads(2):
        with pytest.raises(Stopped):
            generate_file(pipeline, path, out, batch=2, watch=stop_after(1))
        kept = (tmp_path / "out.partial").read_bytes()
    one, two = (
        Pipeline.from_config({**config, "executor": {"use": "local", "threads": threads}})
        for threads in (1, 2)
    )
    with torch_threads(1):
        for run in (pipeline, one):
            with pytest.raises(
                DataError, match=r"\(threads: 2 there, 1 now\)\n  fix: set OMP_NUM_THREADS=2 or"
            ):
                generate_file(run, path, out, batch=2)
        assert (tmp_path / "out.partial").read_bytes() == kept
        assert generate_file(two, path, out, batch=2).items == len(PROMPTS)


def test_a_run_goes_on_with_the_kernels_that_it_was_begun_with(
    config, items, tmp_path, monkeypatch
):
    def loaded(kernels):
        monkeypatch.setenv("BLT_KERNELS", str(kernels))
        return Pipeline.from_config({**config, "run": {**config["run"], "dtype": "float32"}})

    path, out = items([{"prompt": text} for text in PROMPTS]), tmp_path / "out"
    weights = weights_of(loaded("fixed").model.module_dict())
    choice = Choice(dict.fromkeys(weights, dict.fromkeys(ROW_CLASSES, "columns")))
    choice.write(tmp_path / "choice.json")
    begun = loaded(tmp_path / "choice.json")
    with pytest.raises(Stopped):
        generate_file(begun, path, out, batch=2, watch=stop_after(1))
    partial = tmp_path / "out.partial"
    kept, fixed = partial.read_bytes(), loaded("fixed")
    fix = r"fix: set BLT_KERNELS=\S+/out\.partial, without --kernels and \[run\] kernels, or"
    with pytest.raises(DataError, match=rf"\(kernels\)\n  {fix}"):
        generate_file(fixed, path, out, batch=2)
    with (
        torch_threads(torch.get_num_threads() + 1),
        pytest.raises(DataError, match=r"fix: set OMP_NUM_THREADS=\d+ or .*, and set BLT_KERNELS="),
    ):
        generate_file(fixed, path, out, batch=2)
    assert partial.read_bytes() == kept
    (tmp_path / "choice.json").unlink()
    generate_file(loaded(partial), path, out, batch=2)
    assert {each["kernels"] for each in records(out)} == {choice.digest()}
    with pytest.raises(Stopped):
        generate_file(fixed, path, tmp_path / "again", batch=2, watch=stop_after(1))
    with pytest.raises(DataError, match="fix: set BLT_KERNELS=fixed, without"):
        generate_file(begun, path, tmp_path / "again", batch=2)


def test_files_of_others_are_left_alone(pipeline, items, tmp_path):
    path, out = items([{"prompt": "a"}]), tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(DataError, match="is there already"):
        generate_file(pipeline, path, out)
    out.unlink()
    for other in ("mine", "mine\n", '{"a": 1}\n'):
        (tmp_path / "out.partial").write_text(other)
        with pytest.raises(DataError, match="holds no results"):
            generate_file(pipeline, path, out)
        assert (tmp_path / "out.partial").read_text() == other
    (tmp_path / "empty").touch()
    for missing, text in (("nowhere", "No such file"), ("empty", "has no items")):
        with pytest.raises(DataError, match=text):
            generate_file(pipeline, tmp_path / missing, tmp_path / "new")
    assert not (tmp_path / "new.partial").exists()


def test_scores_of_a_file(pipeline, items, tmp_path):
    given = [{"text": "abc"}, {"text": "hello", "prompt": "oh "}, {"prompt": "x"}, {"text": ""}]
    outcome = score_file(pipeline, items(given), tmp_path / "out", batch=2, top=1)
    found = records(tmp_path / "out")
    wanted = pipeline.score(["abc", "hello", ""], prompts=["", "oh ", ""], top=1)
    assert outcome.failed == 1
    assert "error" in found.pop(2)
    for each, score in zip(found, wanted, strict=True):
        assert each["logprob"] == pytest.approx(score.logprob, abs=1e-4)
        assert (each["bytes"], len(each["top_logprobs"])) == (len(score.text), len(score.text))


def test_batches_of_a_window_hold_items_of_similar_length(pipeline, items, tmp_path, monkeypatch):
    sizes = []
    generate = Pipeline.generate

    def watched(self, prompts, **request):
        sizes.append([len(prompt) for prompt in prompts])
        return generate(self, prompts, **request)

    monkeypatch.setattr(Pipeline, "generate", watched)
    texts = ["a" * (1 + at * 7 % 5) for at in range(10)]
    generate_file(pipeline, items([{"prompt": t} for t in texts]), tmp_path / "out", batch=5)
    assert WINDOW > 1
    assert sizes == [sorted(map(len, texts))[:5], sorted(map(len, texts))[5:]]


class Copying:
    """Work whose records are as long as what is asked; it needs no model."""

    settings: ClassVar = {"work": "copy"}
    pipeline = SimpleNamespace(plan=SimpleNamespace(nodes={}))

    def read(self, record):
        return record["prompt"].encode(), b""

    def run(self, items):
        return [[{"text": item.asks[0].decode()}] for item in items]


def peak_memory(folder, count):
    """Bytes that Python objects take at most while so many items of 500 bytes are copied."""
    source, target = folder / f"{count}.jsonl", folder / f"{count}.out"
    with source.open("w") as file:
        for n in range(count):
            file.write(json.dumps({"prompt": f"{n} " + "x" * (400 + n % 200)}) + "\n")
    tracemalloc.start()
    try:
        assert _run(Copying(), Copying, source, target, 4, None).items == count
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_holds_of_an_item_that_is_done_but_where_its_batch_is(tmp_path):
    few, many = 4608, 9216  # both are more than the block of 1 MiB that a file is counted in
    small, large = (peak_memory(tmp_path, count) for count in (few, many))
    # Of a batch of four its place in the file, under the four numbers of its items: 50 to 60 bytes
    # an item, where the item has 500 and its record as many.
    assert large - small < 100 * (many - few)


@pytest.mark.parametrize(("results", "text"), [([], "no result of 3"), ([(7, [])], "of task 7")])
def test_workers_that_lose_or_make_up_results_are_named_and_nothing_is_written(
    pipeline, items, tmp_path, monkeypatch, results, text
):
    class Losing:
        def run(self, tasks, watch=None):
            list(tasks)
            return iter(results)

    def workers(*_):
        return contextlib.nullcontext(Losing())

    monkeypatch.setattr("blt_core.batch_inference._workers", workers)
    with pytest.raises(ComponentError, match=f"Losing gave .*{text}"):
        generate_file(pipeline, items([{"prompt": "a"}] * 3), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
