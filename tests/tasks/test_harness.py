"""Tasks of lm-evaluation-harness, its own YAML over files that lie here."""

from __future__ import annotations

import json
import math

import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from blt_core.component import BuildContext
from blt_core.errors import DataError
from blt_core.evaluation.asking import Asker, Silent
from blt_core.evaluation.figures import mean
from blt_core.evaluation.options import RunOptions
from blt_core.evaluation.running import run_task
from blt_core.evaluation.store import Store
from blt_plugins.tasks.harness import ByteModel, _group_figures
from blt_plugins.tasks.held_out import HeldOut, HeldOutParams
from blt_plugins.tasks.lm_eval import LmEval, LmEvalParams

CHOICES = [
    {"question": "import numpy as", "choices": [" np", " xx"], "answer": 0},
    {"question": "", "choices": ["def", "zz"], "answer": 1},
    {"question": "x = ", "choices": ["é", "(", "much longer than the others"], "answer": 2},
]
TEXTS = [{"text": "def f(x):\n    return x\n"}, {"text": "é import os\n" * 40}, {"text": "x"}]
PROMPTS = [{"prompt": "import os\n" * 40, "answer": "a"}, {"prompt": "", "answer": "b"}]

YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
{rest}
"""
MULTIPLE_CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
GENERATION = """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def yaml(tmp_path, write, monkeypatch):
    """A folder with a task of each sort."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "yaml"
    folder.mkdir()
    for name, records, rest in (
        ("our_choice", CHOICES, MULTIPLE_CHOICE),
        ("our_few", CHOICES[:1], MULTIPLE_CHOICE),
        ("our_rolling", TEXTS, ROLLING),
        ("our_generation", PROMPTS, GENERATION),
    ):
        data = write(f"{name}.jsonl", records)
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, data=data, rest=rest))
    (folder / "group.yaml").write_text(
        "group: our_group\ntask: [our_choice, our_few]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return folder


def run(pipeline, yaml, name, samplers=(), **options):
    task = LmEval(LmEvalParams(task=name, include=str(yaml)), BuildContext())
    return run_task(pipeline, f"lm-eval:{name}", task, samplers, RunOptions(**options))


def logprob(pipeline, prompt: str, text: str) -> float:
    score = pipeline.score(text, prompts=prompt)
    return sum(each.logprob for each in score.likelihoods)


def test_choices_are_made_by_likelihood(pipeline, yaml):
    [found] = run(pipeline, yaml, "our_choice")
    right = 0
    for doc in CHOICES:
        nats = [logprob(pipeline, doc["question"], choice) for choice in doc["choices"]]
        right += nats.index(max(nats)) == doc["answer"]
    [model] = found.samplers
    assert (found.name, found.items, model.name) == ("lm-eval:our_choice", 3, "model")
    assert model.scores["acc"].value == pytest.approx(right / 3)
    assert model.passes is None


def test_rolling_bits_are_those_of_held_out_text_without_eos(pipeline, yaml, tmp_path):
    [found] = run(pipeline, yaml, "our_rolling")
    texts = [each["text"] for each in TEXTS]
    assert max(len(text.encode()) for text in texts) > pipeline.model.context_bytes
    nats = [logprob(pipeline, "", text) for text in texts]
    bits = -sum(nats) / math.log(2) / sum(len(text.encode()) for text in texts)
    scores = found.samplers[0].scores
    assert scores["bits_per_byte"].value == pytest.approx(bits, rel=1e-12)
    assert scores["byte_perplexity"].value == pytest.approx(2**bits, rel=1e-12)
    assert scores["bits_per_byte"].low < bits < scores["bits_per_byte"].high
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    task = HeldOut(HeldOutParams(path=str(tmp_path / "texts")), BuildContext())
    [held_out] = run_task(pipeline, "held-out", task, [], RunOptions())
    without = held_out.samplers[0].scores["bits_per_byte_without_eos"].value
    assert scores["bits_per_byte"].value == pytest.approx(without, rel=1e-12)


def test_texts_are_generated_by_each_sampler(pipeline, yaml):
    [found] = run(pipeline, yaml, "our_generation", ["blt-s draft_bytes=3"])
    assert [each.spec for each in found.samplers] == ["ar", "blt-s draft_bytes=3"]
    assert all(each.identical for each in found.samplers)
    # 5 tokens are 20 bytes; the first prompt fills more than what they leave of the context.
    assert found.told["truncated_share"] == 0.5
    assert found.told["bytes_per_token"] == 4
    alone = [
        pipeline.with_sampler("ar").generate(
            text["prompt"].encode()[-280:], max_new_bytes=20, stop=["e", "\n"], temperature=0.0
        )
        for text in PROMPTS
    ]
    assert found.samplers[0].passes.decoder == sum(each.passes.decoder for each in alone)
    assert found.samplers[0].bytes == sum(len(each.output) for each in alone)


def test_a_group_has_its_tasks_and_itself(pipeline, yaml):
    found = {each.name: each.samplers[0].scores for each in run(pipeline, yaml, "our_group")}
    names = ["lm-eval:our_group/our_choice", "lm-eval:our_group/our_few", "lm-eval:our_group"]
    assert list(found) == names
    [many, few, whole] = (each["acc"] for each in found.values())
    share = len(CHOICES) / (len(CHOICES) + 1)
    assert whole.value == pytest.approx(share * many.value + (1 - share) * few.value)
    assert whole.low <= whole.value <= whole.high


@pytest.mark.parametrize("by_size", [True, False])
def test_the_interval_of_a_group_is_that_of_a_mean_of_its_tasks(by_size):
    many, few = [1.0, 0.0, 1.0, 1.0] * 30, [1.0, 0.0] * 20
    share = len(many) / (len(many) + len(few)) if by_size else 0.5
    value = share * np.mean(many) + (1 - share) * np.mean(few)
    leaves = [(len(each), {"acc": mean(each)}) for each in (many, few)]
    figure = _group_figures({"acc,none": value, "acc_stderr,none": "N/A"}, leaves)["acc"]
    assert figure.value == pytest.approx(value)
    both = ((share, many), (1 - share, few))
    error = sum((w * np.std(each)) ** 2 / len(each) for w, each in both) ** 0.5
    assert np.std(figure.draws(0)) == pytest.approx(error, rel=0.1)
    assert _group_figures({"acc,none": 0.123}, leaves)["acc"].draws(0) is None


def test_tasks_go_on_from_kept_answers(pipeline, yaml, tmp_path, monkeypatch):
    first = run(pipeline, yaml, "our_choice", folder=tmp_path / "out")
    monkeypatch.setattr(type(pipeline), "score", None)
    assert run(pipeline, yaml, "our_choice", folder=tmp_path / "out") == first


def test_programs_may_call_the_harness_themselves(checkpoint, yaml, pipeline):
    model = ByteModel.of(str(checkpoint), "blt-s draft_bytes=2")
    found = lm_eval.simple_evaluate(
        model,
        tasks=["our_choice", "our_generation"],
        task_manager=TaskManager(include_path=str(yaml), include_defaults=False),
        bootstrap_iters=0,
    )
    [expected] = run(pipeline, yaml, "our_choice")
    value = expected.samplers[0].scores["acc"].value
    assert found["results"]["our_choice"]["acc,none"] == pytest.approx(value)
    assert "exact_match,none" in found["results"]["our_generation"]


def requests(kind: str, *arguments) -> list[Instance]:
    return [
        Instance(kind, {}, each, 0, metadata=("t", number, 1))
        for number, each in enumerate(arguments)
    ]


def test_edges_of_requests(pipeline):
    model = ByteModel(Asker(pipeline, Store(None, {}), RunOptions(), Silent()))
    pairs = [("a ", "b"), ("", "b"), ("a", ""), ("", ""), ("p" * 900, "text")]
    found = model.loglikelihood(requests("loglikelihood", *pairs))
    assert found[0][0] == pytest.approx(logprob(pipeline, "a ", "b"))
    assert found[1][0] == pytest.approx(logprob(pipeline, "", "b"))
    assert found[2] == found[3] == (0.0, True)
    assert model.truncated["t"] == 1
    settings = [
        ("x", {"until": [], "max_gen_toks": 2}),
        ("x", {"until": "e"}),
        ("x", {"until": ["e"], "max_gen_toks": 3, "temperature": 1.0, "do_sample": True}),
        ("x", {"until": None, "max_gen_toks": 100_000}),
    ]
    texts = model.generate_until(requests("generate_until", *settings))
    assert len(texts) == 4
    assert "e" not in texts[1] + texts[2]
    with_repeats = requests("generate_until", settings[2])[0]
    twice = model.generate_until([with_repeats, with_repeats])
    assert twice[0] != twice[1], "repeats of a sampled text have draws of their own"


@pytest.mark.usefixtures("_piqa_alone")
def test_what_the_harness_cannot_load_is_told(yaml, tmp_path):
    with pytest.raises(DataError, match="lm-eval has no task, group or tag named 'nothing'"):
        LmEval(LmEvalParams(task="nothing"), BuildContext())
    with pytest.raises(DataError, match="include: there is no folder"):
        LmEval(LmEvalParams(task="piqa", include=str(tmp_path / "none")), BuildContext())
    with pytest.raises(DataError, match=r"(?s)cannot load the task 'piqa': .*\n  fix: its data"):
        LmEval(LmEvalParams(task="piqa"), BuildContext())


def test_the_command_takes_the_name_behind_a_colon(blt, checkpoint, yaml):
    task = f"lm-eval:our_choice include={json.dumps(str(yaml))}"
    done = blt("evaluate", checkpoint, "--task", task, "--json")
    assert done.code == 0, done.err
    [record] = json.loads(done.out)["tasks"]
    assert record["task"] == "lm-eval:our_choice"
    assert record["samplers"][0]["n_dec"] is None
    done = blt("evaluate", checkpoint, "--task", task, "--sampler", "ar")
    assert done.code == 2
    assert "which no sampler changes; leave it out" in done.err
