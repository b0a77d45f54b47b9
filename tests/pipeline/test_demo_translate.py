"""The shipped model of translation: its prompts, its quality, the same bytes by drafting."""

from __future__ import annotations

import pytest
import sacrebleu

from blt_core.pipeline import Generation, Pipeline
from blt_core.resources import resource

#: Language, source and translation; none of it is from the corpus.
PAIRS = [
    (
        "fr",
        "Ouvre une boîte de dialogue pour enregistrer le document.",
        "Opens a dialog to save the document.",
    ),
    (
        "fr",
        "Sélectionnez la cellule que vous souhaitez modifier.",
        "Select the cell that you want to edit.",
    ),
    (
        "fr",
        "Choisissez Format - Page pour changer la taille du papier.",
        "Choose Format - Page to change the paper size.",
    ),
    (
        "fr",
        "Cliquez sur le bouton pour insérer une nouvelle ligne.",
        "Click the button to insert a new row.",
    ),
    (
        "fr",
        "Supprime la feuille active du classeur.",
        "Deletes the current sheet from the spreadsheet.",
    ),
    (
        "de",
        "Öffnet einen Dialog, um das Dokument zu speichern.",
        "Opens a dialog to save the document.",
    ),
    (
        "de",
        "Wählen Sie die Zelle aus, die Sie bearbeiten möchten.",
        "Select the cell that you want to edit.",
    ),
    (
        "de",
        "Klicken Sie auf die Schaltfläche, um eine neue Zeile einzufügen.",
        "Click the button to insert a new row.",
    ),
    (
        "de",
        "Wählen Sie Format - Seite, um die Papiergröße zu ändern.",
        "Choose Format - Page to change the paper size.",
    ),
    ("de", "Löscht das aktuelle Tabellenblatt.", "Deletes the current sheet."),
]
PROMPTS = [f"{language}: {source}\nen:" for language, source, _ in PAIRS]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_toml(resource("configs") / "demo-translate.toml")


@pytest.fixture(scope="module")
def found(pipeline) -> list[Generation]:
    return pipeline.generate(PROMPTS)


@pytest.mark.parametrize("language", ["fr", "de"])
def test_it_translates(found, language):
    rows = [i for i, pair in enumerate(PAIRS) if pair[0] == language]
    references = [[PAIRS[i][2] for i in rows]]
    score = sacrebleu.corpus_bleu([found[i].text.strip() for i in rows], references).score
    copied = sacrebleu.corpus_bleu([PAIRS[i][1] for i in rows], references).score
    assert score > 50
    assert copied < 10


def test_it_ends_a_translation_by_itself(found):
    assert {result.stop_reason for result in found} == {"eos"}


@pytest.mark.parametrize(
    "sampler", ["blt-s draft_bytes=4", "blt-dv block_bytes=8", "blt-cascade draft_bytes=12"]
)
def test_drafting_gives_the_same_bytes(pipeline, found, sampler):
    drafted = pipeline.with_sampler(sampler).generate(PROMPTS)
    assert [result.output for result in drafted] == [result.output for result in found]
    assert sum(result.accepted for result in drafted) > 0
