"""The kept index of a corpus: what is read again, where it is kept, and what is never trusted."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from blt_core.component import BuildContext
from blt_core.errors import DataError, RunError
from blt_core.plugins.loading import load_plugins
from blt_core.wiring.resolve import build_node, resolve_component
from blt_plugins.training.corpora import index_file, indexing, sources
from blt_plugins.training.corpora.files import match_files
from blt_plugins.training.corpora.folder import FileReader
from blt_plugins.training.corpora.index import Part, find
from blt_plugins.training.corpora.indexing import find_all
from blt_plugins.training.corpora.jsonl import LineReader
from blt_plugins.training.corpora.parquet import RowReader


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "blt-core"


@pytest.fixture
def eager(monkeypatch):
    """Indexes of small corpora are kept too, and files of this moment are trusted."""
    monkeypatch.setattr(index_file, "SMALL_FILES", 0)
    monkeypatch.setattr(sources, "SETTLED", -(10**12))


def open_corpus(use: str, path: Path | str, **keys: Any) -> Any:
    plugins = load_plugins()
    node = resolve_component("corpus", {"use": use, "path": str(path), **keys}, plugins)
    return build_node(node, BuildContext(), plugins.registry)


def write_lines(path: Path, *texts: str | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps({'text': text, 'n': 1})}\n" for text in texts))
    return path


def write_corpus(use: str, folder: Path) -> str:
    """Three files, and the path that names them."""
    folder.mkdir()
    for number in range(3):
        texts = [f"{number}: text {i}" for i in range(5)]
        if use == "jsonl":
            write_lines(folder / f"{number}.jsonl", *texts, None, "")
        elif use == "parquet":
            pq.write_table(
                pa.table({"text": texts}), folder / f"{number}.parquet", row_group_size=2
            )
        else:
            (folder / f"{number}.txt").write_text("\n".join(texts))
    return str(folder if use == "folder" else folder / f"*.{use}")


KINDS = pytest.mark.parametrize("use", ["folder", "jsonl", "parquet"])
READERS: dict[str, type] = {"folder": FileReader, "jsonl": LineReader, "parquet": RowReader}


@pytest.fixture
def scanned(monkeypatch):
    """The names of the files that were scanned."""
    found: list[str] = []
    for kind in READERS.values():

        def scan(self: Any, part: Part, scan: Callable[..., Any] = kind.scan) -> Any:
            found.append(Path(self.files.names[part.file]).name)
            return scan(self, part)

        monkeypatch.setattr(kind, "scan", scan)
    return found


def told(corpus: Any) -> dict[str, Any]:
    return {
        split: (found.digest, list(found), [found.source(i) for i in range(len(found))])
        for split in ("train", "valid")
        for found in [corpus.documents(split)]
    }


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


# -- where it is kept ----------------------------------------------------------------------------


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


# -- what is never trusted -----------------------------------------------------------------------


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


# -- several processes ---------------------------------------------------------------------------


@KINDS
def test_workers_find_what_one_process_finds_in_any_number(tmp_path, use, monkeypatch):
    monkeypatch.setattr(indexing, "TASK_BYTES", 60)
    path = write_corpus(use, tmp_path / "texts")
    pattern = path if use != "folder" else f"{path}/*"
    files = match_files(pattern, "", {})
    settings = {} if use == "folder" else {"text_key": "text"}
    reader = READERS[use](files, **settings)
    sizes = [Path(name).stat().st_size for name in files.names]
    numbers = list(range(len(sizes)))
    assert len(list(indexing._tasks(reader, numbers, sizes))) >= 2
    whole = find(reader, [Part(number) for number in numbers])
    for workers in (1, 2):
        found = find_all(reader, numbers, sizes, workers)
        for name in ("counts", "sizes", "keys", "places"):
            assert getattr(found, name).tolist() == getattr(whole, name).tolist(), name


@pytest.mark.parametrize("most", [1, 7, 30, 10_000])
def test_ranges_of_a_file_hold_each_line_once(tmp_path, most):
    path = write_lines(tmp_path / "a.jsonl", "one", "", "zwei ü", None, "x" * 40)
    with path.open("a") as file:
        file.write('\n\n{"text": "the end, without a line end"}')
    reader = LineReader(match_files(str(path), "", {}), "text")
    whole = list(reader.scan(Part(0)))
    parts = reader.parts(0, path.stat().st_size, most)
    assert [row for part in parts for row in reader.scan(part)] == whole
    assert whole[-1][1] == b"the end, without a line end"


def test_a_line_far_longer_than_a_part_is_not_read_again_for_each(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", "x" * 10**6, "two")
    read = []
    line = io.BufferedReader.readline

    class Counted(io.BufferedReader):
        def readline(self, size: int | None = -1) -> bytes:
            found = line(self, -1 if size is None else size)
            read.append(len(found))
            return found

    monkeypatch.setattr(Path, "open", lambda path, _: Counted(io.FileIO(path)))
    reader = LineReader(match_files(str(path), "", {}), "text")
    parts = reader.parts(0, path.stat().st_size, 50_000)
    assert len([row for part in parts for row in reader.scan(part)]) == 2
    assert len(parts) == 21
    assert sum(read) < 4 * 10**6


def test_the_first_fault_in_order_is_raised_with_its_line_by_any_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "TASK_BYTES", 50)
    path = write_lines(tmp_path / "a.jsonl", *(f"text {i}" for i in range(20)))
    lines = path.read_text().splitlines()
    lines[12] = "{"
    lines[17] = "["
    path.write_text("\n".join(lines))
    reader = LineReader(match_files(str(path), "", {}), "text")
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"a.jsonl:13: not valid JSON"):
            find_all(reader, [0], [path.stat().st_size], workers)


def test_a_fault_of_an_earlier_file_is_raised_before_that_of_a_later_table(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "TASK_BYTES", 50)
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_text("no table" * 50)
    reader = RowReader(match_files(f"{tmp_path}/*.parquet", "", {}), "text")
    with pytest.raises(DataError, match=r"a.parquet: no column 'text'"):
        find_all(reader, [0, 1], [40, 400], 1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="without named pipes")
def test_a_worker_ends_with_its_caller_though_it_reads(tmp_path):
    os.mkfifo(tmp_path / "a")  # nobody writes there, so that reading it has no end
    reader = LineReader(sources.LocalFiles([str(tmp_path / "a")], str(tmp_path)), "text")
    worker = indexing._Worker(reader)
    order = {"setup": worker._setup, "names": reader.files.names, "parts": [[0, 0, None]]}
    stdin = worker._process.stdin
    assert stdin is not None
    stdin.write(json.dumps(order).encode() + b"\n")
    stdin.close()
    try:
        assert worker._process.wait(30) == 0
    finally:
        worker.kill()


def test_a_worker_that_dies_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "TASK_BYTES", 50)
    monkeypatch.setattr(indexing, "_START", "import sys; sys.exit(7)")
    path = write_lines(tmp_path / "a.jsonl", *(f"text {i}" for i in range(20)))
    reader = LineReader(match_files(str(path), "", {}), "text")
    with pytest.raises(RunError, match="a process that indexes the corpus has ended with 7"):
        find_all(reader, [0], [path.stat().st_size], 2)


def test_workers_that_cannot_start_are_done_without(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(indexing, "TASK_BYTES", 50)
    path = write_lines(tmp_path / "a.jsonl", *(f"text {i}" for i in range(20)))
    reader = LineReader(match_files(str(path), "", {}), "text")
    start, room = subprocess.Popen, [1]

    def popen(*args: Any, **keys: Any) -> Any:
        if not room:
            raise OSError(11, "Resource temporarily unavailable")
        room.pop()
        return start(*args, **keys)

    monkeypatch.setattr(indexing.subprocess, "Popen", popen)
    for count in (1, 0):
        assert len(find_all(reader, [0], [path.stat().st_size], 2).sizes) == 20
        assert f"count={count}" in capsys.readouterr().err


def test_a_run_that_ends_while_it_indexes_ends_at_once(tmp_path):
    write_lines(tmp_path / "a.jsonl", *(f"text {i}" for i in range(200)))
    script = tmp_path / "script.py"
    script.write_text(f"""
from blt_plugins.training.corpora import indexing
from blt_plugins.training.corpora.files import match_files
from blt_plugins.training.corpora.jsonl import LineReader
from blt_plugins.training.run import together
indexing.TASK_BYTES, together.BEAT = 50, 0.3
indexing._START = "import time; time.sleep(600)"
reader = LineReader(match_files({str(tmp_path / "a.jsonl")!r}, "", {{}}), "text")

class Lost:
    rank, world_size, calls = 0, 2, 0

    def mean(self, values):
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("Connection closed by peer")
        return values

group = together.Together(Lost(), lambda: False, "the corpus")
with group.work():
    group.first_alone(lambda: indexing.find_all(reader, [0], [6000], 2))
""")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "another process has ended, or does not answer: Connection closed" in done.stderr


@pytest.mark.nightly(reason="test_workers_find_what_one_process_finds_in_any_number")
def test_a_script_without_a_main_guard_may_index_with_workers(tmp_path):
    write_lines(tmp_path / "a.jsonl", *(f"text {i}" for i in range(20)))
    script = tmp_path / "script.py"
    script.write_text(f"""
from blt_plugins.training.corpora import indexing
from blt_plugins.training.corpora.files import match_files
from blt_plugins.training.corpora.jsonl import LineReader
indexing.TASK_BYTES = 50
reader = LineReader(match_files({str(tmp_path / "a.jsonl")!r}, "", {{}}), "text")
print(len(indexing.find_all(reader, [0], [600], 2).sizes))
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("20\n", "")


# -- compressed JSON Lines -----------------------------------------------------------------------


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
