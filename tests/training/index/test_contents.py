"""The kept index of a corpus: what is read again, and what is never trusted."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from blt_core.errors import DataError
from blt_plugins.training.corpora import index_file
from tests.training.index.texts import KINDS, open_corpus, told, write_corpus, write_lines


@KINDS
@pytest.mark.usefixtures("eager")
def test_a_second_start_reads_no_file_and_finds_the_same(tmp_path, use, scanned):
    path = write_corpus(use, tmp_path / "texts")
    first = told(open_corpus(use, path))
    assert len(scanned) == 3
    assert told(open_corpus(use, path)) == first
    assert len(scanned) == 3
    waiting = open_corpus(use, path, check="full")  # as another process of the same run does
    assert told(open_corpus(use, path, check="full")) == first
    assert len(scanned) == 6
    assert told(waiting) == first
    assert len(scanned) == 6


@KINDS
@pytest.mark.usefixtures("eager")
def test_only_files_that_changed_or_came_are_read_again(tmp_path, use, scanned):
    path = write_corpus(use, tmp_path / "texts")
    open_corpus(use, path).documents("train")
    scanned.clear()
    names = sorted(each for each in (tmp_path / "texts").iterdir() if each.is_file())
    new = names[0].with_name(f"a{names[0].suffix}")
    new.write_bytes(names[0].read_bytes())
    names[1].unlink()
    names[2].write_bytes(names[0].read_bytes())
    kept = told(open_corpus(use, path))
    assert sorted(scanned) == sorted([new.name, names[2].name])
    assert told(open_corpus(use, path, index=str(tmp_path / "elsewhere"))) == kept


@pytest.mark.usefixtures("eager")
def test_a_file_of_the_same_size_and_time_is_read_again(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", "one", "two")
    before = open_corpus("jsonl", path, valid_percent=0).documents("train")
    times = path.stat()
    write_lines(path, "one", "six")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = open_corpus("jsonl", path, valid_percent=0).documents("train")
    assert list(after) == [b"one", b"six"]
    assert after.digest != before.digest
    with pytest.raises(DataError, match=r"a.jsonl: changed while it was in use"):
        before[1]


def test_a_file_that_was_just_written_is_not_trusted(tmp_path, monkeypatch, scanned):
    monkeypatch.setattr(index_file, "SMALL_FILES", 0)
    path = write_lines(tmp_path / "a.jsonl", "one", "two")
    for count in (1, 2):
        open_corpus("jsonl", path).documents("train")
        assert len(scanned) == count


def test_small_corpora_leave_nothing_behind(tmp_path, own_cache):
    path = write_lines(tmp_path / "texts" / "a.jsonl", "one", "two")
    open_corpus("jsonl", path).documents("train")
    assert [each.name for each in path.parent.iterdir()] == ["a.jsonl"]
    assert not own_cache.exists()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _forge(path: Path) -> None:
    """Other sizes, under the old checksum."""
    with safe_open(str(path), "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no dict
        metadata = file.metadata()
    save_file({**tensors, "sizes": tensors["sizes"] + 1}, path, metadata)


def _of_another(path: Path) -> None:
    with safe_open(str(path), "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no dict
        metadata = file.metadata()
    of = metadata["of"][::-1]
    checksum = index_file._checksum(tensors, of)
    save_file(tensors, path, {"of": of, "sha256": checksum})


def _disagree(path: Path) -> None:
    """Sums that are right, of tensors that do not fit each other."""
    with safe_open(str(path), "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no dict
        metadata = file.metadata()
    tensors["counts"] = tensors["counts"] + np.int64(1)
    checksum = index_file._checksum(tensors, metadata["of"])
    save_file(tensors, path, {**metadata, "sha256": checksum})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_flip, "its checksum is wrong"),
        (_cut, "incomplete"),
        (lambda path: path.write_bytes(b"\x80\x04N."), "Error"),
        (lambda path: path.write_bytes(b""), "Error"),
        (_forge, "its checksum is wrong"),
        (_of_another, "it is of another corpus"),
        (_disagree, "its parts do not fit each other"),
    ],
)
@pytest.mark.usefixtures("eager")
def test_a_spoilt_index_is_made_anew_with_a_warning(tmp_path, capsys, scanned, spoil, reason):
    path = write_lines(tmp_path / "a.jsonl", "one", "two", "three")
    first = told(open_corpus("jsonl", path))
    [kept] = (tmp_path / ".blt-index").glob("*.safetensors")
    spoil(kept)
    capsys.readouterr()
    assert told(open_corpus("jsonl", path)) == first
    said = capsys.readouterr().err
    assert said.count("the index is made anew") == 1
    assert reason.lower() in said.lower()
    assert told(open_corpus("jsonl", path)) == first
    assert scanned == ["a.jsonl"] * 2
    assert "anew" not in capsys.readouterr().err


@pytest.mark.usefixtures("eager")
def test_a_full_disk_costs_the_index_alone(tmp_path, monkeypatch, capsys):
    def full(*_: object) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_file, "replace_file", full)
    path = write_lines(tmp_path / "a.jsonl", "one", "two")
    assert len(open_corpus("jsonl", path, valid_percent=0).documents("train")) == 2
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.usefixtures("eager")
def test_runs_that_start_at_once_read_the_corpus_once(tmp_path, scanned):
    path = write_lines(tmp_path / "a.jsonl", *(f"text {i}" for i in range(200)))
    open_corpus("jsonl", path)  # imports
    found, start = [], threading.Barrier(3)

    def run() -> None:
        corpus = open_corpus("jsonl", path)
        start.wait(20)
        found.append(told(corpus))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert scanned == ["a.jsonl"]
