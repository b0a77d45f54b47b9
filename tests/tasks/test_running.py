"""Tasks with samplers: what is asked, what is kept, and what comes of it."""

from __future__ import annotations

import json
import re
from typing import Literal

import attrs
import pytest
import torch

from blt_core.cli.app import run as run_command
from blt_core.cli.inputs import find_source
from blt_core.compare import NEAR_TIE, repeats
from blt_core.errors import ComponentError, DataError, RequestError, RunError
from blt_core.evaluation.answering import Begin
from blt_core.evaluation.figures import mean
from blt_core.evaluation.options import RunOptions
from blt_core.evaluation.protocol import Part, Passage, Question
from blt_core.evaluation.reporting import as_record, draw, frontier
from blt_core.evaluation.running import run_task
from blt_core.execution import AtHand, torch_threads
from blt_core.pipeline import Pipeline
from blt_core.published import SCALES
from tests.tasks.namespaces import needs_namespaces

PROMPTS = [b"def f(x):", b"import os\n", b"x = ", b"class A:\n    def", b"for i in", b"", b"print("]


@attrs.define
class Lengths:
    """A task: how long outputs are. It dies after so many questions."""

    asks: Literal["text", "likelihood"] = "text"
    samples: int = 1
    temperature: float = 0.0

    def run(self, model, limit):
        questions = [
            Question(
                key=str(index),
                prompt=prompt,
                max_new_bytes=12,
                stop=(b"e",),
                samples=self.samples,
                temperature=self.temperature,
                seed=index,
            )
            for index, prompt in enumerate(PROMPTS[:limit])
        ]
        answers = model.generate(questions)
        sizes = [len(each.outputs[0]) for each in answers]
        return [
            Part("first", 1, {"bytes": mean(sizes[:1])}, ("0",)),
            Part("", len(sizes), {"bytes": mean(sizes)}, tuple(q.key for q in questions)),
        ]


@pytest.fixture
def calls(monkeypatch):
    """How many prompts are asked in each call of generate."""
    found: list[int] = []
    generate = Pipeline.generate

    def counting(self, prompts, **request):
        found.append(len(prompts))
        return generate(self, prompts, **request)

    monkeypatch.setattr(Pipeline, "generate", counting)
    return found


def without_speed(results) -> list:
    records = [as_record(each) for each in results]
    for record in records:
        for each in record["samplers"]:
            each.pop("bytes_per_second")
    return records


def test_costs_are_those_of_each_question_alone(pipeline):
    options = RunOptions(batch=3, parameters=SCALES["3b"])
    found = run_task(pipeline, "sizes", Lengths(), ["blt-s draft_bytes=3"], options)
    assert [each.name for each in found] == ["sizes/first", "sizes"]
    for result, prompts in zip(found, (PROMPTS[:1], PROMPTS), strict=True):
        reference, drafted = result.samplers
        assert (reference.spec, drafted.spec) == ("ar", "blt-s draft_bytes=3")
        for each in result.samplers:
            alone = [
                pipeline.with_sampler(each.spec).generate(
                    prompt, max_new_bytes=12, stop="e", temperature=0.0
                )
                for prompt in prompts
            ]
            assert each.passes.decoder == sum(one.passes.decoder for one in alone)
            assert each.passes.encoder == sum(one.passes.encoder for one in alone)
            size = sum(len(one.output) for one in alone)
            assert each.bytes == size
            scale = SCALES["3b"]
            big = scale.encoder + scale.global_model
            assert each.in_gigabytes(each.cost) == pytest.approx(
                2 * (each.passes.decoder * scale.decoder + each.passes.encoder * big) / 1e9
            )
            paper = 2 * (size * scale.decoder + 308 / 512 * size * big) / 1e9
            assert each.relative_cost_paper == pytest.approx(each.cost / paper)
            assert each.relative_cost == pytest.approx(each.cost / reference.cost)
            assert each.identical is True
            assert each.agreement == 1.0
            assert each.repeats == repeats([bytes(one.output) for one in alone])
            assert each.of_ar["bytes"].value == 1.0
        assert drafted.drafted > 0


def test_the_list_orders_and_ar_is_run_if_it_is_not_in_it(pipeline):
    options = RunOptions(limit=2)
    listed = ["blt-s draft_bytes=2", "ar", "blt-s draft_bytes=2"]
    [*_, found] = run_task(pipeline, "sizes", Lengths(), listed, options)
    assert [each.spec for each in found.samplers] == ["blt-s draft_bytes=2", "ar"]
    [*_, found] = run_task(pipeline, "sizes", Lengths(), [], options)
    assert [each.spec for each in found.samplers] == ["ar"]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_run_that_was_cut_short_goes_on_to_the_same_figures(
    pipeline, tmp_path, calls, monkeypatch, temperature
):
    task = Lengths(samples=2 if temperature else 1, temperature=temperature)
    options = RunOptions(batch=2, folder=tmp_path / "out")
    samplers = ["blt-s draft_bytes=3"]
    whole = without_speed(run_task(pipeline, "t", task, samplers, RunOptions(batch=2)))
    needed = len(calls)
    calls.clear()
    generate = Pipeline.generate

    def dying(self, prompts, **request):
        if len(calls) == 3:  # one of which warms up
            raise KeyboardInterrupt
        return generate(self, prompts, **request)

    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "generate", dying)
        with pytest.raises(KeyboardInterrupt):
            run_task(pipeline, "t", task, samplers, options)
    # The last line is torn, as by a kill in the middle of a write.
    [file] = (tmp_path / "out").rglob("*.jsonl")
    text = file.read_bytes()
    file.write_bytes(text[:-20])
    calls.clear()
    assert without_speed(run_task(pipeline, "t", task, samplers, options)) == whole
    assert 0 < len(calls) < needed
    calls.clear()
    assert without_speed(run_task(pipeline, "t", task, samplers, options)) == whole
    assert not calls, "all answers are kept"


def test_kept_answers_of_other_settings_are_refused(pipeline, tmp_path):
    options = RunOptions(limit=2, folder=tmp_path)
    run_task(pipeline, "t", Lengths(), [], options)
    with pytest.raises(DataError, match=r"other settings:\n  batch: 16 there, 3 now\n  fix: "):
        run_task(pipeline, "t", Lengths(), [], attrs.evolve(options, batch=3))
    before = torch.get_num_threads()
    with (
        torch_threads(before + 1),
        pytest.raises(DataError, match=rf"{before + 1} now\n  fix: set OMP_NUM_THREADS={before}"),
    ):
        run_task(pipeline, "t", Lengths(), [], options)
    [file] = tmp_path.rglob("*.jsonl")
    kept = file.read_text()
    file.write_text(kept + "no json\n")
    with pytest.raises(DataError, match=r"ar-\S+\.jsonl: not read as answers of a task.*\n  fix: "):
        run_task(pipeline, "t", Lengths(), [], options)
    file.write_text("a letter of somebody else's, without an end")
    with pytest.raises(DataError, match=r"ar-\S+\.jsonl: holds no answers of a task\n  fix: "):
        run_task(pipeline, "t", Lengths(), [], options)
    assert file.read_text().startswith("a letter")


@pytest.fixture
def failing(monkeypatch):
    """Prompts that the model fails at; all others it continues."""
    generate, bad = Pipeline.generate, []

    def may_fail(self, prompts, **request):
        if any(prompt in bad for prompt in prompts):
            raise RunError("not this one")
        return generate(self, prompts, **request)

    monkeypatch.setattr(Pipeline, "generate", may_fail)
    return bad


def test_a_question_that_fails_is_an_error_of_its_own_and_the_rest_are_answered(
    pipeline, tmp_path, failing, calls, monkeypatch
):
    prompts = [*PROMPTS, b"a" * 10_000]  # the last is longer than the model's context
    monkeypatch.setattr("tests.tasks.test_running.PROMPTS", prompts)
    options, samplers = RunOptions(batch=3, folder=tmp_path), ["blt-s draft_bytes=3"]
    failing.append(PROMPTS[2])
    [_, found] = run_task(pipeline, "t", Lengths(), samplers, options)
    [_, ar] = run_task(pipeline, "t", Lengths(), [], RunOptions(batch=3))
    assert [each.errors for each in found.samplers] == [2, 2]
    reference, drafted = found.samplers
    assert drafted.first_error == "2: not this one"
    assert drafted.scores["bytes"].value == ar.samplers[0].scores["bytes"].value
    # What is relative to ar is of those that have answers.
    assert (drafted.same, drafted.outputs, drafted.agreement) == (6, 6, 1.0)
    assert reference.relative_cost == 1.0
    assert drafted.relative_cost == pytest.approx(drafted.cost / reference.cost)
    record = as_record(found)["samplers"][0]
    assert (record["errors"], record["first_error"]) == (2, "2: not this one")
    assert found.items == 8
    failing.clear()
    calls.clear()
    [_, again] = run_task(pipeline, "t", Lengths(), samplers, options)
    assert [each.errors for each in again.samplers] == [1, 1], "what has failed is tried again"
    assert calls == [1, 3, 1, 3], "a warm-up, and the batch whole, of each sampler"
    monkeypatch.setattr("tests.tasks.test_running.PROMPTS", prompts[-1:])
    with pytest.raises(RequestError, match="context"):
        run_task(pipeline, "t", Lengths(), samplers, RunOptions())


def test_the_command_shows_errors_and_exits_with_1(blt, checkpoint, pairs, failing):
    task = f'translation pairs={pairs} max_new_bytes=8 template="{{source}}"'
    asked = ("evaluate", checkpoint, "--task", task, "--batch", 4)
    failing.append(b"Zeile 1")
    for more in ((), ("--json",)):
        done = blt(*asked, *more)
        assert done.code == 1
        assert "an error in place of an answer" in done.err
        assert re.search(r"translation/de, ar: 1\n.*\n.*\n  the first: .*: not this one", done.err)
    assert [t["samplers"][0]["errors"] for t in json.loads(done.out)["tasks"]] == [1, 1, 2]
    assert b"ar: 2 questions have an error in place of an answer" in blt(*asked).out


def test_half_a_surrogate_pair_is_read_as_its_bytes(blt, checkpoint, write):
    pair = {"language": "de", "source": "a\ud800", "target": "b"}
    task = f"translation pairs={write('odd.jsonl', [pair])} max_new_bytes=8"
    done = blt("evaluate", checkpoint, "--task", task, "--json")
    assert done.code == 0, done.err


def test_two_runs_do_not_write_to_one_folder(pipeline, tmp_path):
    class Nested(Lengths):
        def run(self, model, limit):
            with pytest.raises(DataError, match="another run writes here"):
                run_task(pipeline, "t", Lengths(), [], RunOptions(folder=tmp_path))
            return super().run(model, limit)

    run_task(pipeline, "t", Nested(), [], RunOptions(folder=tmp_path))


def test_another_question_under_the_same_key_is_asked_anew(pipeline, tmp_path, calls):
    options = RunOptions(limit=2, folder=tmp_path)
    run_task(pipeline, "t", Lengths(), [], options)
    calls.clear()
    run_task(pipeline, "t", Lengths(temperature=0.5), [], options)
    assert calls


def test_each_sample_can_be_made_again_alone(pipeline):
    class Sampled(Lengths):
        def run(self, model, limit):
            parts = super().run(model, limit)
            self.answers = model.answers
            return parts

    task = Sampled(samples=3, temperature=1.0)
    run_task(pipeline, "t", task, [], RunOptions(batch=7))
    for index, prompt in enumerate(PROMPTS):
        alone = pipeline.with_sampler("ar").generate(
            prompt, max_new_bytes=12, stop="e", temperature=1.0, seed=index, samples=3
        )
        assert task.answers[str(index)].outputs == tuple(each.output for each in alone)


def test_outputs_that_differ_are_counted_and_near_ties_apart(pipeline, monkeypatch):
    class Damaged(Lengths):
        runs = 0

        def run(self, model, limit):
            parts = super().run(model, limit)
            if self.runs:  # the second sampler's
                other = attrs.evolve(model.answers["0"], outputs=(b"\x00",))
                model.answers["0"] = other
            Damaged.runs += 1
            return parts

    def told():
        Damaged.runs = 0
        samplers = ["blt-s draft_bytes=2"]
        [_, found] = run_task(pipeline, "t", Damaged(), samplers, RunOptions())
        return found.samplers[1]

    found = told()
    count = len(PROMPTS)
    assert (found.identical, found.same, found.outputs) == (False, count - 1, count)
    assert found.near_ties == 0
    assert found.agreement < 1
    monkeypatch.setattr("blt_core.compare.NEAR_TIE", dict.fromkeys(NEAR_TIE, 1e9))
    assert told().near_ties == 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (None, "run gave None; expected a list of Part"),
        ([], "run gave no part"),
        ([Part("", 1, {"a": True})], "figure 'a': expected a Figure, got True"),
        ([Part("", 1, {}, ("nokey",))], "no question has the key 'nokey'"),
    ],
)
def test_a_task_that_breaks_its_contract_is_named(pipeline, parts, message):
    class Broken(Lengths):
        def run(self, model, limit):
            return parts

    with pytest.raises(ComponentError, match=message):
        run_task(pipeline, "t", Broken(), [], RunOptions())
    with pytest.raises(ComponentError, match="asks = 'tokens'; expected 'text' or 'likelihood'"):
        run_task(pipeline, "t", Lengths(asks="tokens"), [], RunOptions())


class Likely:
    asks: Literal["text", "likelihood"] = "likelihood"

    def run(self, model, limit):
        texts = [b"import os", b"", b"x" * 700, b"import os"]
        found = model.score([Passage(b"p" * 290, text) for text in texts])
        self.found = found
        return [Part("", len(found), {"nats": mean([each.logprob for each in found])})]


def test_a_task_of_given_texts_is_run_once_and_takes_no_sampler(pipeline, tmp_path):
    task = Likely()
    options = RunOptions(folder=tmp_path)
    [found] = run_task(pipeline, "l", task, [], options)
    [model] = found.samplers
    assert (model.name, model.spec) == ("model", "model")
    record = as_record(found)["samplers"][0]
    empty = ("n_dec", "n_enc", "gigabytes", "relative_gigabytes", "identical_to_ar", "agreement")
    assert all(record[name] is None for name in (*empty, "repeats", "bytes_per_second"))
    for each, text in zip(task.found, [b"import os", b"", b"x" * 700, b"import os"], strict=True):
        score = pipeline.score(text, prompts=b"p" * 290)
        assert each.logprob == pytest.approx(sum(one.logprob for one in score.likelihoods))
        assert each.eos == pytest.approx(score.eos.logprob)
        assert each.greedy == all(
            one.top[0][0] == one.id
            for one in pipeline.score(text, prompts=b"p" * 290, top=1).likelihoods
        )
    assert [each.truncated for each in task.found] == [False, False, True, False]
    [again] = run_task(pipeline, "l", Likely(), [], options)
    assert again == found
    with pytest.raises(RequestError, match="'l' scores given texts, which no sampler changes"):
        run_task(pipeline, "l", task, ["ar"], RunOptions())


def test_the_frontier_is_what_no_other_beats_in_both():
    points = [(1.0, 30.0), (0.5, 30.0), (0.4, 20.0), (0.45, 10.0), (0.3, 20.0), (0.1, 5.0)]
    assert frontier(points) == [5, 4, 1]


def test_a_picture_is_drawn_of_each_part(pipeline, tmp_path):
    found = run_task(pipeline, "sizes", Lengths(), ["blt-s draft_bytes=3"], RunOptions())
    paths = [tmp_path / "frontier.png", tmp_path / "frontier.svg"]
    draw(found, paths)
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    shown = paths[1].read_text()
    for each in found:
        assert f"{each.name}, {each.items} items" in shown
    assert "blt-s draft_bytes=3" in shown
    assert sorted(tmp_path.iterdir()) == paths


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def pairs(write):
    records = [
        {"language": language, "source": f"Zeile {n}", "target": f"row {n} of the text"}
        for n in range(3)
        for language in ("de", "fr")
    ]
    return write("pairs.jsonl", records)


def test_the_command_prints_a_table_and_the_record_that_scripts_rely_on(
    blt, checkpoint, pairs, tmp_path
):
    task = f"translation pairs={pairs} max_new_bytes=8"
    base = ("evaluate", checkpoint, "--task", task, "--sampler", "blt-s draft_bytes=2")
    done = blt(*base, "--out", tmp_path / "out", "--plot", tmp_path / "plot.png", "--timed", "2")
    assert done.code == 0, done.err
    shown = done.out.decode()
    for text in ("translation/de: 3 items", "translation: 6 items", "copy of source", "rel. GB"):
        assert text in shown
    assert "own GB" not in shown  # all prices are of the model's own sizes
    assert (tmp_path / "plot.png").exists()
    assert b"own GB" in blt(*base, "--limit", "2", "--cost-parameters", "3b").out
    done = blt(*base, "--json", "--limit", "2", "--cost-parameters", "3b")
    record = json.loads(done.out)
    assert record["cost_parameters"]["global_model"] == SCALES["3b"].global_model
    assert [(t["task"], t["items"]) for t in record["tasks"]] == [
        ("translation/de", 2),
        ("translation/fr", 2),
        ("translation", 4),
    ]
    for each in record["tasks"][-1]["samplers"]:
        assert {"value", "low", "high"} == set(each["scores"]["bleu"])
        for key in ("n_dec", "n_enc", "gigabytes", "bytes_per_second", "agreement", "repeats"):
            assert each[key] >= 0
        assert each["relative_gigabytes"] > 0
        assert each["relative_gigabytes_paper"] > 0
        assert each["identical_to_ar"] is True
    named = [(each["name"], each["spec"]) for each in record["tasks"][-1]["samplers"]]
    assert named == [("ar", "ar"), ("blt-s", "blt-s draft_bytes=2")]
    assert record["tasks"][-1]["samplers"][0]["relative_gigabytes"] == 1


def test_an_executor_answers_as_this_process_does(blt, checkpoint, pairs, tmp_path):
    (tmp_path / "text.txt").write_text("held out, all of it")
    tasks = (f"translation pairs={pairs} max_new_bytes=8", f"held-out path={tmp_path / 'text.txt'}")
    found = []
    for more in ((), ("--executor", "local"), ("--executor", "local", "--out", tmp_path / "out")):
        records = []
        for task, sampler in zip(tasks, ("blt-s draft_bytes=2", None), strict=True):
            asked = ("--sampler", sampler) if sampler else ()
            done = blt("evaluate", checkpoint, "--task", task, *asked, *more, "--json")
            assert done.code == 0, done.err
            records.append(json.loads(done.out)["tasks"])
        for each in records[0]:
            for figures in each["samplers"]:
                del figures["bytes_per_second"]
        found.append(records)
    assert found[0] == found[1] == found[2]
    again = blt("evaluate", checkpoint, "--task", tasks[1], "--out", tmp_path / "out", "--json")
    assert json.loads(again.out)["tasks"] == found[0][1], "kept answers serve with any executor"


def test_workers_that_lose_an_answer_are_named(pipeline):
    class Losing:
        def run(self, tasks, watch=None):
            return iter(())

    with pytest.raises(ComponentError, match=r"Losing gave no result of [1-9]") as error:
        run_task(pipeline, "lengths", Lengths(), ["ar"], RunOptions(workers=Losing()))
    assert error.value.contract == "executor.results"


def test_a_worker_with_other_weights_or_kernels_refuses(checkpoint):
    source = find_source(str(checkpoint))
    with pytest.raises(RunError, match="finds other weights"):
        Begin(AtHand(None), source, "another digest", None)(print)
    with pytest.raises(RunError, match="has other kernels"):
        Begin(AtHand(None), source, Pipeline.load(source).model.digest(), "another")(print)


def refused(done, message):
    assert done.code == 2
    assert message in done.err
    assert done.out == b""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "translatio pairs=x"), "Did you mean 'translation'?"),
        (("--task", "translation"), 'give pairs = "FILE.jsonl"'),
        (("--task", "translation pairs=nowhere.jsonl"), "nowhere.jsonl: No such file"),
        (("--task", "held-out path=.", "file.txt"), "FILES go without --task"),
        (("--task", "held-out path=.", "--sampler", "ar"), "which no sampler changes"),
        (("--task", "translation pairs=x template='{language}: {source}'"), "x: No such file"),
        (("--task", "held-out path=.", "--rounds", "3"), "--rounds: goes with FILES"),
        (("file.txt", "--limit", "3"), "--limit: goes with --task"),
        ((), "give held-out FILES, or --task"),
        (("--task", "humaneval path=nowhere"), "nowhere: No such file"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    blt, checkpoint, arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("held out")
    refused(blt("evaluate", checkpoint, *arguments), message)


@pytest.mark.usefixtures("_piqa_alone")
def test_a_task_that_lm_eval_has_not_is_refused(blt, checkpoint):
    done = blt("evaluate", checkpoint, "--task", "lm-eval:no_such_task")
    refused(done, "lm-eval has no task, group or tag")


def test_held_out_text_as_a_task_is_what_evaluate_scores(blt, checkpoint, tmp_path):
    (tmp_path / "texts").mkdir()
    for n, text in enumerate(("import os\n" * 40, "x = 1\n", "def f():\n    pass\n")):
        (tmp_path / "texts" / f"{n}.py").write_text(text)
    folder = tmp_path / "texts"
    done = blt("evaluate", checkpoint, "--task", f"held-out path={folder}", "--json")
    scores = json.loads(done.out)["tasks"][0]["samplers"][0]["scores"]
    plain = json.loads(blt("evaluate", checkpoint, folder, "--rounds", "0", "--json").out)
    for name in ("bits_per_byte", "bits_per_byte_without_eos"):
        assert scores[name]["value"] == pytest.approx(plain[name], rel=1e-5)
    assert plain["bits_per_byte_without_eos"] < plain["bits_per_byte"]


def test_programs_run_only_where_they_are_allowed(checkpoint, write, capsys):
    problem = {"task_id": "a/0", "prompt": "def f():\n", "test": "", "entry_point": "f"}
    path = write("problems.jsonl", [problem])
    arguments = ["evaluate", str(checkpoint), "--task", f"humaneval path={path} max_new_bytes=4"]
    assert run_command(arguments) == 2
    assert "--allow-code-execution" in capsys.readouterr().err
    arguments[-1] += " execute=false"
    assert run_command([*arguments, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["tasks"][0]["samplers"][0]["scores"]
    assert set(scores) == {"python", "bits_per_byte"}


@needs_namespaces
@pytest.mark.parametrize("unsafe", [False, True])
def test_the_command_runs_programs_and_tells_in_which_sandbox(checkpoint, write, capsys, unsafe):
    rest = {"prompt": "def f():\n", "entry_point": "f"}
    whole = {**rest, "task_id": "a/0", "test": "def check(f):\n    pass"}
    wrong = {**rest, "task_id": "a/1", "test": "def check(f):\n    assert 0"}
    problems = write("problems.jsonl", [whole, wrong])
    shown = {"text": "", "code": "pass", "test_setup_code": "", "test_list": ["assert 1"]}
    basic = write("mbpp.jsonl", [{**shown, "task_id": number} for number in (2, 3, 4, 11)])
    tasks = (f"humaneval path={problems}", f"mbpp path={basic}")
    arguments = ["evaluate", str(checkpoint), "--allow-code-execution", "--json"]
    for task in tasks:
        arguments += ["--task", f"{task} max_new_bytes=4 seconds=20"]
    assert run_command([*arguments, "--unsafe-no-sandbox"] if unsafe else arguments) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]
    assert [(each["task"], each["items"]) for each in found] == [("humaneval", 2), ("mbpp", 1)]
    for each in found:
        assert each["sandbox"] == ("none" if unsafe else "namespaces")
        assert 0 <= each["samplers"][0]["scores"]["pass@1"]["value"] <= 1
    assert found[0]["samplers"][0]["scores"]["pass@1"]["value"] <= 0.5, "one cannot be solved"
