"""Processes that read a corpus for its index."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blt_core.errors import DataError, RunError
from blt_plugins.training.corpora import indexing, sources
from blt_plugins.training.corpora.files import match_files
from blt_plugins.training.corpora.index import Part, find
from blt_plugins.training.corpora.indexing import find_all
from blt_plugins.training.corpora.jsonl import LineReader
from blt_plugins.training.corpora.parquet import RowReader
from tests.training.index.texts import KINDS, READERS, write_corpus, write_lines


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
