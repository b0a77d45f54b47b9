"""Where an index is kept, and which one is taken."""

from __future__ import annotations

import pytest

from blt_plugins.training.corpora import index_file, sources
from tests.training.index.texts import open_corpus, told, write_corpus, write_lines


@pytest.mark.usefixtures("eager")
def test_it_lies_beside_the_corpus_where_no_pattern_takes_it(tmp_path):
    folder = tmp_path / "texts"
    path = write_corpus("folder", folder)
    count = len(open_corpus("folder", path, valid_percent=0).documents("train"))
    assert {each.suffix for each in (folder / ".blt-index").iterdir()} >= {".safetensors"}
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / ".more").write_text("x")
    for pattern, own in (("**/*", count), ("**/.*/**/*", 1), ("**/.*/.*", 1), ("**/.*", 1)):
        found = open_corpus("folder", path, pattern=pattern, valid_percent=0).documents("train")
        assert len(found) == own, pattern


@pytest.mark.usefixtures("eager")
def test_it_lies_in_the_cache_folder_beside_a_corpus_that_cannot_be_written(
    tmp_path, monkeypatch, own_cache, scanned
):
    path = write_lines(tmp_path / "texts" / "a.jsonl", "one", "two")
    (path.parent / ".blt-index").write_text("in the way")
    for _ in range(2):
        open_corpus("jsonl", path).documents("train")
    assert scanned == ["a.jsonl"]
    assert len(list((own_cache / "index").glob("*.safetensors"))) == 1


def test_a_key_names_the_place_also_of_small_corpora(tmp_path, monkeypatch, scanned):
    monkeypatch.setattr(sources, "SETTLED", -(10**12))
    places = [write_lines(tmp_path / name / "a.jsonl", name, "two") for name in ("x", "y")]
    for _ in range(2):
        for path in places:
            keys = {"valid_path": str(path), "index": str(tmp_path / "kept")}
            texts = list(open_corpus("jsonl", path, **keys).documents("train"))
            assert texts == [path.parent.name.encode(), b"two"]
    assert len(scanned) == 2  # the held-out files are the same, and so is their index
    assert len(list((tmp_path / "kept" / ".blt-index").glob("*.safetensors"))) == 2


@pytest.mark.usefixtures("eager")
def test_the_index_that_holds_true_is_taken_though_another_lies_beside_the_corpus(
    tmp_path, monkeypatch, scanned
):
    path = write_lines(tmp_path / "texts" / "a.jsonl", "one", "two")
    open_corpus("jsonl", path).documents("train")
    write_lines(path, "one", "two", "three")
    prepare = index_file.Place.prepare
    monkeypatch.setattr(
        index_file.Place,
        "prepare",
        lambda place: place.path.parent.name != ".blt-index" and prepare(place),
    )
    for _ in range(2):
        found = open_corpus("jsonl", path, valid_percent=0).documents("train")
        assert list(found) == [b"one", b"two", b"three"]
        assert scanned == ["a.jsonl"] * 2


@pytest.mark.usefixtures("eager")
def test_an_index_that_is_kept_in_the_folder_of_the_corpus_is_no_document(tmp_path):
    folder = tmp_path / "texts"
    path = write_corpus("folder", folder)
    for _ in range(2):
        found = open_corpus("folder", path, index=str(folder), valid_percent=0)
        assert len(found.documents("train")) == 3
    assert len(list((folder / ".blt-index").glob("*.safetensors"))) == 1


@pytest.mark.usefixtures("eager")
def test_an_index_belongs_to_the_settings_of_its_reader(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "body": "two"}\n')
    for key, text in (("text", b"one"), ("body", b"two"), ("text", b"one")):
        found = open_corpus("jsonl", tmp_path / "a.jsonl", text_key=key, valid_percent=0)
        assert list(found.documents("train")) == [text]
    assert len(list((tmp_path / ".blt-index").glob("*.safetensors"))) == 2


@pytest.mark.usefixtures("eager")
def test_a_moved_folder_keeps_its_index_however_it_is_named(tmp_path, monkeypatch, scanned):
    write_corpus("folder", tmp_path / "texts")
    first = told(open_corpus("folder", tmp_path / "texts"))
    (tmp_path / "texts").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    scanned.clear()
    assert told(open_corpus("folder", ".")) == first
    assert scanned == []
