"""The task of translation: pairs, prompts, and scores."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from blt_core.component import BuildContext
from blt_core.errors import DataError
from blt_plugins.tasks.translation import Translation, TranslationParams

PAIRS = [
    {"language": "fr", "source": "Une ligne", "target": "A row of the table is here"},
    {"language": "de", "source": "Eine Zeile", "target": "Click the row, then press Enter"},
    {"language": "fr", "source": "Deux lignes", "target": "Two rows of the other table"},
]


def task(**params) -> Translation:
    return Translation(TranslationParams(**params), BuildContext())


def test_outputs_are_scored_by_language_and_in_all(write, scripted):
    answers = {
        b"fr: Une ligne\nen:": b" A row of the table is there\n",
        b"fr: Deux lignes\nen:": b" Two rows of the other table",
        b"de: Eine Zeile\nen:": b" Press the row, then press Enter \n",
    }
    model = scripted(lambda question: answers[question.prompt])
    parts = task(pairs=str(write("pairs.jsonl", PAIRS))).run(model, None)
    assert [(part.name, part.items) for part in parts] == [("fr", 2), ("de", 1), ("", 3)]
    outputs = {"fr": ["A row of the table is there", "Two rows of the other table"]}
    outputs["de"] = ["Press the row, then press Enter"]
    targets = {n: [p["target"] for p in PAIRS if p["language"] == n] for n in ("fr", "de")}
    outputs[""], targets[""] = (both["fr"] + both["de"] for both in (outputs, targets))
    for part in parts:
        for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
            expected = metric.corpus_score(outputs[part.name], [targets[part.name]])
            assert part.figures[name].value == pytest.approx(expected.score)
            assert part.told["signatures"][name] == str(metric.get_signature())
        assert part.told["truncated_share"] == 0
    assert parts[2].keys == parts[0].keys + parts[1].keys
    copied = BLEU().corpus_score(["Eine Zeile"], [["Click the row, then press Enter"]]).score
    assert parts[1].told["copy_of_source"]["bleu"] == pytest.approx(copied)
    assert all(q.stop == (b"\n",) and q.temperature == 0 for q in model.questions)


def test_two_aligned_files_are_pairs(tmp_path, scripted):
    source, reference = tmp_path / "fra.devtest", tmp_path / "eng.devtest"
    source.write_bytes("\ufeffUne ligne\r\nDéjà vu\r\n".encode())
    reference.write_text("A row\nSeen before\n")
    model = scripted(lambda question: b" A row")
    [part] = task(source=str(source), reference=str(reference)).run(model, None)
    assert part.items == 2
    prompts = [question.prompt.decode() for question in model.questions]
    assert prompts == ["fr: Une ligne\nen:", "fr: Déjà vu\nen:"]
    reference.write_text("A row\n")
    with pytest.raises(DataError, match=r"fra\.devtest has 2 lines and \S+ 1: line by line"):
        task(source=str(source), reference=str(reference)).run(model, None)


def test_shots_stand_before_each_prompt(write, scripted):
    shots = write("shots.jsonl", [*PAIRS[:2], {**PAIRS[1], "target": "Another"}])
    params = {"pairs": str(write("pairs.jsonl", PAIRS[2:])), "shot_pairs": str(shots)}
    model = scripted(lambda question: b"x")
    task(**params, shots=1, template="{language}> {source} =").run(model, None)
    [question] = model.questions
    expected = "fr> Une ligne = A row of the table is here\nfr> Deux lignes ="
    assert question.prompt.decode() == expected
    with pytest.raises(DataError, match="1 pairs of the language 'fr', and shots = 2"):
        task(**params, shots=2).run(model, None)


def test_shots_may_come_from_two_aligned_files(write, scripted, tmp_path):
    source, reference = tmp_path / "fra.dev", tmp_path / "eng.dev"
    source.write_text("Une ligne\nDeux lignes\n")
    reference.write_text("A row\nTwo rows\n")
    params = {"shot_source": str(source), "shot_reference": str(reference)}
    model = scripted(lambda question: b"x")
    task(pairs=str(write("pairs.jsonl", PAIRS[2:])), **params, shots=2).run(model, None)
    [question] = model.questions
    expected = "fr: Une ligne\nen: A row\nfr: Deux lignes\nen: Two rows\nfr: Deux lignes\nen:"
    assert question.prompt.decode() == expected


def test_prompts_are_cut_from_the_left_to_what_the_model_serves(write, scripted):
    records = [{"source": "é" * 100, "target": "e"}, {"source": "kurz", "target": "short"}]
    model = scripted(lambda question: b"x")
    model.context_bytes = 64
    pairs = write("p.jsonl", records)
    [part] = task(pairs=str(pairs), max_new_bytes=20, language="fr").run(model, None)
    assert part.told["truncated_share"] == 0.5
    cut, whole = model.questions
    assert whole.prompt == b"fr: kurz\nen:"
    assert len(cut.prompt) <= 64 - 20
    assert cut.prompt.decode().endswith("é\nen:"), "a character is never cut in two"


def test_a_limit_takes_pairs_of_each_language(write, scripted):
    model = scripted(lambda question: b"x")
    parts = task(pairs=str(write("pairs.jsonl", PAIRS * 10))).run(model, 3)
    assert [(part.name, part.items) for part in parts] == [("fr", 3), ("de", 3), ("", 6)]


def test_without_texts_the_fetched_pairs_are_read(write, scripted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = scripted(lambda question: b"x")
    with pytest.raises(DataError, match=r"no corpora/translate/test\.jsonl\n  fix: give pairs"):
        task().run(model, None)
    Path("corpora/translate").mkdir(parents=True)
    write("pairs.jsonl", PAIRS).rename("corpora/translate/test.jsonl")
    parts = task().run(model, None)
    assert [part.name for part in parts] == ["fr", "de", ""]
    assert parts[0].told["data"] == "corpora/translate/test.jsonl"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"pairs": "a", "source": "b", "reference": "c"}, 'expected pairs = "FILE.jsonl"'),
        ({"source": "a"}, "two files with the same lines: give both"),
        ({"pairs": "a", "shots": 2}, "shots says how many"),
        ({"pairs": "a", "shot_source": "b", "shot_reference": "c"}, "shots says how many"),
        ({"pairs": "a", "shots": 2, "shot_source": "b"}, "expected shot_pairs, or shot_source"),
        ({"pairs": "a", "template": "{language}:"}, "expected a template with {source}"),
        ({"pairs": "a", "template": "{source} {x}"}, "no fields but {source}, {language}"),
        ({"pairs": "a", "template": "{source"}, "is no template"),
    ],
)
def test_params_that_cannot_be_meant_are_refused(params, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TranslationParams(**params)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"source": "a"}\n', r"pairs\.jsonl:1: expected the key 'target', a str; it has 'source'"),
        ('{"source": "a", "target": "b"}\n[]\n', r":2: expected an object, got list"),
        ("\n{\n", r":2: not valid JSON"),
        ("\n", "has no records"),
    ],
)
def test_malformed_pairs_are_named_by_their_line(tmp_path, scripted, text, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        task(pairs=str(path)).run(scripted(lambda _: b""), None)
