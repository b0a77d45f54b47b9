"""The folder corpus: which files, in which order, on which side."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from blt_core.component import BuildContext
from blt_core.errors import DataError
from blt_plugins.training.corpus import FolderCorpus, FolderCorpusParams


def corpus(path: Path, **keys: Any) -> FolderCorpus:
    return FolderCorpus(FolderCorpusParams(path=str(path), **keys), BuildContext())


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_files_come_sorted_by_their_path_and_empty_ones_not_at_all(tmp_path):
    write(tmp_path, b__x="2", a__z="1", b__a="0", c="3", empty="")
    found = corpus(tmp_path, valid_percent=0).documents("train")
    assert list(found) == [b"1", b"0", b"2", b"3"]


def test_hidden_files_are_taken_only_where_the_pattern_names_them(tmp_path):
    folder = tmp_path / ".texts"  # a folder that is named outright may be hidden
    names = (".git/HEAD", ".github/a.yml", ".env", "src/b", "src/__pycache__/b.pyc")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)

    def found(pattern: str) -> list[str]:
        texts = corpus(folder, pattern=pattern, valid_percent=0).documents("train")
        return [text.decode() for text in texts]

    assert found("**/*") == ["src/b"]
    assert found(".github/**/*") == [".github/a.yml"]
    assert found("**/.*") == [".env"]
    assert found("**/.*/**/*") == [".git/HEAD", ".github/a.yml"]
    assert found("**/__pycache__/*") == ["src/__pycache__/b.pyc"]


def test_folders_named_train_and_valid_are_the_two_sides(tmp_path):
    write(tmp_path, train__a="learn", valid__b="test", other="no")
    both = corpus(tmp_path)
    assert list(both.documents("train")) == [b"learn"]
    assert list(both.documents("valid")) == [b"test"]


def test_a_folder_of_held_out_files_leaves_all_others_for_training(tmp_path):
    write(tmp_path, own__a="1", own__b="2", held__c="3")
    both = corpus(tmp_path / "own", valid_path=str(tmp_path / "held"))
    assert list(both.documents("train")) == [b"1", b"2"]
    assert list(both.documents("valid")) == [b"3"]


def test_a_share_is_held_out_by_content_so_that_copies_stay_on_one_side(tmp_path):
    files = {f"f{i}": f"text {i}" for i in range(40)}
    copies = {f"copy{i}": f"text {i}" for i in range(40)}
    both = corpus(write(tmp_path, **files, **copies), valid_percent=20)
    train, valid = set(both.documents("train")), set(both.documents("valid"))
    assert train & valid == set()
    assert len(train | valid) == 40
    assert 4 <= len(valid) <= 12


def test_of_two_files_one_is_held_out_however_small_the_share(tmp_path):
    both = corpus(write(tmp_path, a="1", b="2"), valid_percent=0.1)
    assert len(list(both.documents("train"))) == len(list(both.documents("valid"))) == 1


def test_nothing_is_held_out_at_zero_percent(tmp_path):
    both = corpus(write(tmp_path, a="1", b="2"), valid_percent=0)
    assert list(both.documents("valid")) == []
    assert len(list(both.documents("train"))) == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": "nowhere"}, "nowhere: no such folder"),
        ({"path": "a"}, "a: is not a folder"),
        ({"path": ".", "pattern": "*.txt"}, "no file matches '*.txt' (corpus.pattern)"),
        ({"path": ".", "pattern": "/x"}, "corpus.pattern: '/x' is no glob below a folder"),
        ({"path": ".", "valid_path": "gone"}, "gone: no such folder"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, monkeypatch, keys, message):
    monkeypatch.chdir(write(tmp_path, a="1"))
    with pytest.raises(DataError, match=re.escape(message)):
        FolderCorpus(FolderCorpusParams(**keys), BuildContext())


def test_a_file_that_vanished_is_named(tmp_path):
    files = corpus(write(tmp_path, a="1", b="2"), valid_percent=0)
    (tmp_path / "b").unlink()
    with pytest.raises(DataError, match=r"b: cannot be read: No such file"):
        list(files.documents("train"))
