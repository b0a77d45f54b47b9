"""Compressed JSON Lines, and the copies that they are read from."""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path

import pytest

from blt_core.errors import DataError
from tests.training.index.texts import open_corpus, write_lines


def compress(path: Path, suffix: str) -> Path:
    import bz2
    import lzma

    data = path.read_bytes()
    half = len(data) // 2
    target = path.with_name(path.name + suffix)
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        each = zstandard.ZstdCompressor().compress
    else:
        each = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix.lower()]
    target.write_bytes(each(data[:half]) + each(data[half:]))  # two members, as pigz writes them
    return target


@pytest.mark.parametrize("suffix", [".gz", ".GZ", ".bz2", ".xz", ".zst"])
@pytest.mark.usefixtures("eager")
def test_compressed_lines_are_those_of_the_file(tmp_path, suffix, own_cache, scanned):
    path = write_lines(tmp_path / "a.jsonl", *(f"text {i}" for i in range(30)))
    plain = open_corpus("jsonl", path).documents("train")
    packed = compress(path, suffix)
    for _ in range(2):
        found = open_corpus("jsonl", packed).documents("train")
        assert list(reversed([found[i] for i in reversed(range(len(found)))])) == list(plain)
        assert found.digest == plain.digest
        assert f"a.jsonl{suffix}@" in found.source(0)
    assert scanned == ["a.jsonl", packed.name]
    copies = [each for each in (own_cache / "decompressed").iterdir() if each.suffix != ".lock"]
    assert len(copies) == 1
    copies[0].unlink()  # while it is in use, as another run's clean-up may
    assert found[3] == plain[3]


def copies_in(cache: Path) -> list[Path]:
    found = (cache / "decompressed").iterdir()
    return [each for each in found if each.suffix != ".lock"]


@pytest.mark.usefixtures("eager")
def test_copies_that_are_gone_are_made_again_before_any_text_is_read(tmp_path, own_cache):
    packed = compress(write_lines(tmp_path / "a.jsonl", "one", "two"), ".gz")
    open_corpus("jsonl", packed).documents("train")
    [copy] = copies_in(own_cache)
    copy.unlink()
    (copy.parent / f".{copy.name}.new-0123").write_text("what a killed process has left")
    open_corpus("jsonl", packed).documents("train")
    assert copies_in(own_cache) == [copy]
    assert copy.parent.stat().st_mode & 0o77 == 0 or sys.platform == "win32"


@pytest.mark.parametrize("check", ["stat", "full"])
@pytest.mark.usefixtures("eager")
def test_a_spoilt_copy_is_made_anew(tmp_path, own_cache, check):
    packed = compress(write_lines(tmp_path / "a.jsonl", "one", "two"), ".gz")
    open_corpus("jsonl", packed).documents("train")
    [copy] = copies_in(own_cache)
    copy.write_bytes(copy.read_bytes().replace(b"two", b"six"))
    if check == "stat":
        with pytest.raises(DataError, match=r'changed while it was(.|\n)*corpus.check = "full"'):
            list(open_corpus("jsonl", packed, valid_percent=0).documents("train"))
    found = open_corpus("jsonl", packed, valid_percent=0, check=check).documents("train")
    assert list(found) == [b"one", b"two"]


def test_a_damaged_zstd_file_is_named(tmp_path):
    packed = compress(write_lines(tmp_path / "a.jsonl", "one", "two" * 99), ".zst")
    data = bytearray(packed.read_bytes())
    data[4:12] = b"\xff" * 8
    packed.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"a.jsonl.zst: cannot be decompressed: "):
        open_corpus("jsonl", packed).documents("train")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_that_is_cut_off_is_named(tmp_path, suffix, own_cache):
    packed = compress(write_lines(tmp_path / "a.jsonl", "one", "two" * 99), suffix)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"a.jsonl{suffix}: cannot be decompressed: "):
        open_corpus("jsonl", packed).documents("train")
    assert [e for e in (own_cache / "decompressed").iterdir() if e.suffix != ".lock"] == []


def test_a_broken_line_of_a_compressed_file_is_named_by_its_number(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", "one", "two")
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(DataError, match=r"a.jsonl.gz:3: not valid JSON"):
        open_corpus("jsonl", compress(path, ".gz")).documents("train")


def test_without_zstandard_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    for name in ("zstandard", "compression"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"(\xb5/\xfd")
    with pytest.raises(DataError, match=r"zstd files need zstandard.   fix: pip install zstandard"):
        open_corpus("jsonl", tmp_path / "a.jsonl.zst").documents("train")


def test_copies_that_nobody_used_for_long_make_room(tmp_path, own_cache):
    folder = own_cache / "decompressed"
    folder.mkdir(parents=True)
    for name, age in (("old", 31 * 24 * 3600), ("new", 3600)):
        (folder / name).write_text(name)
        then = (folder / name).stat().st_mtime - age
        os.utime(folder / name, (then, then))
    packed = compress(write_lines(tmp_path / "a.jsonl", "one", "two"), ".gz")
    open_corpus("jsonl", packed).documents("train")
    assert not (folder / "old").exists()
    assert (folder / "new").exists()
