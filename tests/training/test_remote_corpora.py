"""Corpora behind URLs: what is found, read and kept, and what errors say."""

from __future__ import annotations

import datetime as dt
import email.utils
import gzip
import io
import json
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from blt_core.component import BuildContext
from blt_core.errors import ConfigError, DataError
from blt_core.plugins.loading import load_plugins
from blt_core.wiring.resolve import build_node, resolve_component
from blt_plugins.training.corpora import files, sources
from blt_plugins.training.corpora.files import match_files
from blt_plugins.training.corpora.folder import FileReader
from blt_plugins.training.corpora.index import Part
from blt_plugins.training.corpora.jsonl import LineReader
from blt_plugins.training.corpora.urls import shown

TEXTS = [f"text {i} ü" for i in range(40)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "blt-core"


@pytest.fixture
def memory():
    """A function that writes files into fsspec's file system of this process."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]

    def write(**files: bytes) -> None:
        for name, data in files.items():
            system.pipe_file("/" + name.replace("__", "/").replace("_dot_", "."), data)

    yield write
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def open_corpus(use: str, path: str, **keys: Any) -> Any:
    plugins = load_plugins()
    node = resolve_component("corpus", {"use": use, "path": path, **keys}, plugins)
    return build_node(node, BuildContext(), plugins.registry)


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(texts: list[str]) -> bytes:
    data = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), data, row_group_size=7)
    return data.getvalue()


def arrow(texts: list[str]) -> bytes:
    data = io.BytesIO()
    feather.write_feather(pa.table({"text": texts}), data, chunksize=7)
    return data.getvalue()


FORMATS = pytest.mark.parametrize(
    ("use", "packed"),
    [
        ("jsonl", lines),
        ("jsonl", lambda texts: gzip.compress(lines(texts))),
        ("parquet", parquet),
        ("parquet", arrow),
    ],
    ids=["jsonl", "jsonl.gz", "parquet", "arrow"],
)


@FORMATS
def test_documents_behind_a_url_are_those_of_the_files(memory, tmp_path, use, packed, request):
    end = ".gz" if "gz" in request.node.callspec.id else ".data"
    system = fsspec.filesystem("memory")
    (tmp_path / "texts").mkdir()
    for name, texts in (("a", TEXTS[:15]), ("b", TEXTS[15:])):
        system.pipe_file(f"/texts/deep/{name}{end}", packed(texts))
        (tmp_path / "texts" / f"{name}{end}").write_bytes(packed(texts))
    here = open_corpus(use, f"{tmp_path}/texts/*{end}")
    for path in (f"memory://texts/deep/*{end}", f"memory://texts/**/*{end}"):
        there = open_corpus(use, path)
        for split in ("train", "valid"):
            one, other = there.documents(split), here.documents(split)
            assert list(one) == list(other)
            assert one.digest == other.digest
            order = [5, 0, len(one) - 1, 5] if len(one) > 5 else [0]
            assert [one[i] for i in order] == [other[i] for i in order]
        assert "memory:///texts/deep/a" in there.documents("train").source(0)


def test_a_folder_behind_a_url_is_that_of_its_files(memory, tmp_path):
    memory(x__train__b_dot_txt=b"learn", x__train__c__d=b"more", x__valid__a=b"test")
    both = open_corpus("folder", "memory://x")
    assert list(both.documents("train")) == [b"learn", b"more"]
    assert list(both.documents("valid")) == [b"test"]
    assert both.documents("train").source(1) == "c/d"
    memory(x___dot_env=b"hidden", x__train___dot_git__x=b"hidden")
    assert len(open_corpus("folder", "memory://x", valid_percent=0).documents("train")) == 2
    alone = open_corpus("folder", "memory://x/train", pattern="*.txt", valid_percent=0)
    assert list(alone.documents("train")) == [b"learn"]


def test_a_second_start_reads_what_is_kept_until_the_file_changes(memory, own_cache, monkeypatch):
    memory(a=lines(TEXTS))
    first = open_corpus("jsonl", "memory://a").documents("train")
    assert len(list((own_cache / "index").glob("*.safetensors"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(LineReader, "scan", None)
        again = open_corpus("jsonl", "memory://a").documents("train")
        late = open_corpus("jsonl", "memory://a").documents("train")
    assert (again.digest, list(again)) == (first.digest, list(first))
    memory(a=lines([text.replace("text", "word") for text in TEXTS]))  # of the same size
    with pytest.raises(DataError, match="memory:///a: changed while it was in use"):
        list(late)
    other = open_corpus("jsonl", "memory://a").documents("train")
    assert other.digest != first.digest


def test_a_mixture_of_files_here_and_there_has_all_of_them(memory, tmp_path):
    memory(a=lines(["there"]))
    (tmp_path / "b.jsonl").write_bytes(lines(["here"]))
    parts = {
        "a": {"use": "jsonl", "path": "memory://a", "valid_percent": 0},
        "b": {"use": "jsonl", "path": str(tmp_path / "b.jsonl"), "valid_percent": 0},
    }
    plugins = load_plugins()
    node = resolve_component("corpus", {"use": "mixture", "parts": parts}, plugins)
    mixed = build_node(node, BuildContext(), plugins.registry)
    assert list(mixed.documents("train")) == [b"there", b"here"]


def test_documents_behind_a_url_come_in_the_order_of_those_here(memory, tmp_path):
    for name in ("a/x", "a-b/x", "a.b/x"):
        fsspec.filesystem("memory").pipe_file(f"/texts/{name}", lines([name]))
        (tmp_path / "texts" / name).parent.mkdir(parents=True)
        (tmp_path / "texts" / name).write_bytes(lines([name]))
    here, there = (
        list(open_corpus("jsonl", f"{top}/texts/**/x", valid_percent=0).documents("train"))
        for top in (tmp_path, "memory://")
    )
    assert here == there == [b"a/x", b"a-b/x", b"a.b/x"]


def test_files_of_archives_are_told_apart_and_known_again(tmp_path, monkeypatch):
    def write(name: str, text: str) -> str:
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr(zipfile.ZipInfo("x.jsonl"), lines([text]))
        return f"zip://*.jsonl::file://{tmp_path / name}"

    def texts(url: str) -> list[bytes]:
        return list(open_corpus("jsonl", url, valid_percent=0).documents("train"))

    urls = [write("a.zip", "one"), write("b.zip", "two")]
    assert [texts(url) for url in urls] == [[b"one"], [b"two"]]
    with monkeypatch.context() as patch:
        patch.setattr(LineReader, "scan", None)
        assert [texts(url) for url in urls] == [[b"one"], [b"two"]]
    write("a.zip", "six")
    assert texts(urls[0]) == [b"six"]


def test_what_gives_access_is_neither_shown_nor_kept(memory, own_cache):
    system = fsspec.filesystem("memory")
    for name in ("/a?sig=secret", "/b?sig=secret"):
        system.pipe_file(name, lines(["one"]) + (b"{\n" if "b" in name else b""))
    found = open_corpus("jsonl", "memory://a?sig=secret", valid_percent=0).documents("train")
    assert (list(found), found.source(0)) == ([b"one"], "memory:///a@0")
    [kept] = (own_cache / "index").glob("*.safetensors")
    assert b"secret" not in kept.read_bytes()
    assert b"memory" not in kept.read_bytes()
    assert kept.parent.stat().st_mode & 0o77 == 0 or sys.platform == "win32"
    for path in ("b", "none"):
        with pytest.raises((ConfigError, DataError)) as raised:
            open_corpus("jsonl", f"memory://{path}?sig=secret").documents("train")
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://me:secret@host/a/b.jsonl", "https://host/a/b.jsonl"),
        ("zip://*.x::https://host/a.zip?sig=secret", "zip://*.x::https://host/a.zip"),
        ("404, url='https://host/a?x=1&sig=secret'", "404, url='https://host/a'"),
        ("s3://bucket/part-?.parquet", "s3://bucket/part-?.parquet"),
        ("a?b=c", "a?b=c"),
    ],
)
def test_messages_show_urls_without_what_gives_access(text, told):
    assert shown(text) == told


def test_links_behind_urls_are_files_where_they_lead_to_some():
    class System:
        def isfile(self, name: str) -> bool:
            return name == "x/link"

    kinds = {"x/b": "file", "x/link": "link", "x/gone": "other", "x/deep": "directory"}
    found = {name: {"type": kind} for name, kind in kinds.items()}
    assert files._visible(System(), found, "x/*") == ["x/b", "x/link"]


def test_a_file_whose_time_is_told_by_the_second_is_not_trusted_at_once(memory, monkeypatch):
    memory(a=lines(TEXTS))
    reader = LineReader(match_files("memory://a", "", {}), "text")
    now = int(time.time())
    date = email.utils.formatdate
    for told, settled in (
        ({"Last-Modified": date(now, usegmt=True)}, False),
        ({"Last-Modified": date(now - 60, usegmt=True)}, True),
        ({"Last-Modified": date(now, usegmt=True), "ETag": "x"}, True),
        ({"mtime": now}, False),
        ({"mtime": now + 0.5}, True),
        ({"LastModified": dt.datetime.fromtimestamp(now, dt.timezone.utc)}, False),
        ({}, True),
    ):
        info = {"name": "/a", "size": 7, **told}
        monkeypatch.setattr(fsspec.filesystem("memory"), "info", lambda _, info=info: info)
        assert (reader.files.stamp(0)[2] != sources.UNSETTLED) == settled, told


def test_options_reach_the_file_system(tmp_path, memory):
    memory(a_dot_jsonl=lines(TEXTS))
    options = {"target_protocol": "memory", "cache_storage": str(tmp_path / "own")}
    found = open_corpus("jsonl", "filecache://a.jsonl", storage_options=options, valid_percent=0)
    assert len(found.documents("train")) == len(TEXTS)
    assert any((tmp_path / "own").iterdir())


# -- what errors say -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "path", "message"),
    [
        ("jsonl", "memory://none.jsonl", "memory://none.jsonl: no such file, and no file matches"),
        ("parquet", "memory://x/*.pq", r"memory://x/\*.pq: no such file, and no file matches"),
        ("jsonl", "memory://x", r"memory://x: is a folder; .* corpus.path = 'memory://x/\*.jsonl'"),
        ("folder", "memory://y", "memory://y: no such folder"),
        ("jsonl", "s3://b/a.jsonl", r"s3://b/a.jsonl: needs a package .*fix: pip install s3fs"),
        ("folder", "gs://b/a", r"gs://b/a: needs a package .*fix: pip install gcsfs"),
        (
            "jsonl",
            "nosuch://a",
            "nosuch://a: cannot be read: ValueError: Protocol not known: nosuch",
        ),
    ],
)
def test_what_is_not_there_is_named(memory, use, path, message, monkeypatch):
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    memory(x__a=b"1")
    with pytest.raises(ConfigError, match=message):
        open_corpus(use, path)


def test_a_broken_line_is_named_by_its_url_and_number(memory):
    memory(a=lines(TEXTS) + b"{\n")
    with pytest.raises(DataError, match=r"memory:///a:41: not valid JSON"):
        open_corpus("jsonl", "memory://a").documents("train")


def test_a_damaged_table_is_named_by_its_url(memory):
    memory(a=parquet(TEXTS)[:-30], b=b"no such thing")
    with pytest.raises(DataError, match=r"memory:///a: (damaged|cannot be read): "):
        open_corpus("parquet", "memory://a").documents("train")
    with pytest.raises(DataError, match=r"memory:///b: neither a Parquet file nor an Arrow IPC"):
        open_corpus("parquet", "memory://b").documents("train")


class Failing(io.BytesIO):
    """A file whose connection breaks, or ends without a word, after some bytes."""

    def __init__(self, data: bytes, *, silent: bool) -> None:
        super().__init__(data)
        self._silent = silent

    def readall(self) -> bytes:
        return self.read(500)

    def readinto(self, buffer: Any) -> int:
        if self.tell() >= 500:
            if self._silent:
                return 0
            raise ConnectionResetError(104, "Connection reset by peer")
        return super().readinto(memoryview(buffer)[:100])


@pytest.mark.parametrize(
    ("silent", "message"),
    [
        (False, r"memory:///a: cannot be read: ConnectionResetError: .*reset by peer\n  fix: run"),
        (True, r"memory:///a: its text ended at byte \d+ of \d+"),
    ],
)
def test_a_connection_that_ends_is_an_error_and_never_a_shorter_text(
    memory, monkeypatch, silent, message
):
    data = lines([f"a text of some length {i:05}" for i in range(200)])
    memory(a=data)
    system = fsspec.filesystem("memory")
    monkeypatch.setattr(type(system), "_open", lambda *_, **__: Failing(data, silent=silent))
    reader = LineReader(match_files("memory://a", "", {}), "text")
    with pytest.raises(DataError, match=message):
        list(reader.scan(Part(0)))


def test_a_file_that_ends_early_is_no_shorter_document(memory, monkeypatch):
    memory(x__a=b"a text" * 200)
    reader = FileReader(files.find_files("memory://x", "*", {}))
    system = fsspec.filesystem("memory")
    monkeypatch.setattr(
        type(system), "_open", lambda *_, **__: Failing(b"a text" * 200, silent=True)
    )
    with pytest.raises(DataError, match=r"memory:///x/a: its text ended at byte \d+ of 1200"):
        list(reader.texts(0, [0]))


# -- over HTTP -----------------------------------------------------------------------------------


class Ranges(BaseHTTPRequestHandler):
    """Serves ``files`` in ranges of bytes, and counts what it sends."""

    files: ClassVar[dict[str, bytes]] = {}
    sent: ClassVar[list[int]] = []
    accepts = "bytes"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        data = self.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        begin, end = 0, len(data)
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1 if last else end, end)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Accept-Ranges", self.accepts)
        self.send_header("ETag", f'"{hash(data)}"')
        self.end_headers()
        if with_body:
            self.sent.append(end - begin)
            self.wfile.write(data[begin:end])


@contextmanager
def serving(**files: bytes) -> Iterator[str]:
    Ranges.files = {f"/{name.replace('_dot_', '.')}": data for name, data in files.items()}
    Ranges.sent = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of fsspec's session, which it closes late
def test_documents_come_over_http_in_ranges(tmp_path: Path, monkeypatch):
    texts = [f"{i} " + "x" * 5000 for i in range(400)]
    files = {"a_dot_jsonl": lines(texts), "b_dot_gz": gzip.compress(lines(texts))}
    with serving(**files, c=parquet(texts)) as url:
        first, *others = (
            open_corpus(use, f"{url}/{name}").documents("train")
            for use, name in (("jsonl", "a.jsonl"), ("jsonl", "b.gz"), ("parquet", "c"))
        )
        assert all(other.digest == first.digest for other in others)
        Ranges.sent.clear()
        again = open_corpus("jsonl", f"{url}/a.jsonl").documents("train")
        assert again[300] == first[300]
        assert 0 < sum(Ranges.sent) < len(files["a_dot_jsonl"]) / 2
        Ranges.files["/a.jsonl"] = lines([text.replace("x", "y") for text in texts])
        assert open_corpus("jsonl", f"{url}/a.jsonl").documents("train").digest != first.digest
        with monkeypatch.context() as patch:
            patch.setattr(Ranges, "accepts", "none")
            with pytest.raises(DataError, match=r"/a.jsonl: its server gives no ranges of bytes"):
                open_corpus("jsonl", f"{url}/a.jsonl", index=str(tmp_path)).documents("train")
        Ranges.files["/a.jsonl"] = b""
        reader = LineReader(match_files(f"{url}/a.jsonl", "", {}), "text")
        assert list(reader.scan(Part(0))) == []
        del Ranges.files["/a.jsonl"]
        with pytest.raises(ConfigError, match=r"/a.jsonl: no such file"):
            open_corpus("jsonl", f"{url}/a.jsonl")
