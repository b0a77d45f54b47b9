"""The corpora: which documents, in which order, on which side, and how often."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from blt_core.component import BuildContext
from blt_core.errors import ConfigError, DataError
from blt_core.plugins.loading import load_plugins
from blt_core.protocols import Corpus
from blt_core.types import IdScheme
from blt_core.wiring.resolve import build_node, resolve_component
from blt_plugins.training.corpora.folder import FolderCorpus, FolderCorpusParams
from blt_plugins.training.corpora.pieces import in_any_order, texts_of
from blt_plugins.training.corpora.sources import LocalFiles
from blt_plugins.training.data.order import Batches
from blt_plugins.training.data.windows import cut_windows


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


def test_what_changed_since_it_was_indexed_is_named(tmp_path):
    found = corpus(write(tmp_path, a="1", b="2"), valid_percent=0).documents("train")
    (tmp_path / "b").write_text("longer")
    assert found[0] == b"1"
    with pytest.raises(DataError, match="b: changed while it was in use; run the command again"):
        found[1]


def test_files_without_a_byte_are_no_corpus(tmp_path):
    with pytest.raises(DataError, match="a: it and all other files hold no text"):
        corpus(write(tmp_path, a="", b="")).documents("train")


# -- JSON Lines, Parquet, Arrow ------------------------------------------------------------------

LINES = ["one", "", "zwei ü", "x\ny", "\x00", *(f"text {i}" for i in range(40))]


def write_jsonl(path: Path, texts: Sequence[str | None]) -> Path:
    path.write_text("\n".join(json.dumps({"id": 1, "text": text}) for text in texts) + "\n\n")
    return path


def write_parquet(path: Path, texts: Sequence[str | None], kind: Any = None) -> Path:
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts).cast(kind or pa.string())})
    pq.write_table(table, path, row_group_size=7)
    return path


def write_arrow(path: Path, texts: Sequence[str | None]) -> Path:
    feather.write_feather(pa.table({"text": texts}), path, chunksize=7)
    return path


def open_corpus(kind: str, **table: Any) -> Corpus:
    plugins = load_plugins()
    node = resolve_component("corpus", {"use": kind, **table}, plugins)
    return build_node(node, BuildContext(), plugins.registry)


FORMATS = pytest.mark.parametrize(
    ("kind", "write_file"),
    [("jsonl", write_jsonl), ("parquet", write_parquet), ("parquet", write_arrow)],
    ids=["jsonl", "parquet", "arrow"],
)


@FORMATS
def test_records_come_in_order_and_are_found_by_their_number(tmp_path, kind, write_file):
    write_file(tmp_path / "b.data", LINES)
    write_file(tmp_path / "a.data", ["first", None])
    found = open_corpus(kind, path=f"{tmp_path}/*.data", valid_percent=0).documents("train")
    expected = [text.encode() for text in ["first", *LINES] if text]
    assert list(found) == expected
    assert [found[i] for i in (30, 0, 12, 12, 1)] == [expected[i] for i in (30, 0, 12, 12, 1)]
    assert found.sizes.tolist() == [len(text) for text in expected]
    assert found.sizes.dtype == "int64"
    assert "a.data" in found.source(0)
    assert "b.data" in found.source(1) != found.source(2)


@FORMATS
def test_records_are_held_out_by_content_or_by_their_own_files(tmp_path, kind, write_file):
    file = str(write_file(tmp_path / "all", LINES * 2))
    both = open_corpus(kind, path=file, valid_percent=20)
    train, valid = set(both.documents("train")), set(both.documents("valid"))
    assert train & valid == set()
    assert train | valid == {text.encode() for text in LINES if text}
    assert 5 <= len(valid) <= 13
    held = str(write_file(tmp_path / "held", ["held"]))
    both = open_corpus(kind, path=file, valid_path=held)
    assert list(both.documents("valid")) == [b"held"]
    assert len(both.documents("train")) == 2 * len(train | valid)


def test_the_same_texts_are_held_out_and_have_the_same_digest_in_every_format(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, text in enumerate(LINES):
        (folder / f"{number:03}").write_text(text, newline="")
    corpora = [
        open_corpus("folder", path=str(folder)),
        open_corpus("jsonl", path=str(write_jsonl(tmp_path / "a.jsonl", LINES))),
        open_corpus("parquet", path=str(write_parquet(tmp_path / "a.parquet", LINES))),
        open_corpus("parquet", path=str(write_arrow(tmp_path / "a.arrow", LINES))),
    ]
    for split in ("train", "valid"):
        first, *others = (each.documents(split) for each in corpora)
        assert len(first) > 0
        for other in others:
            assert list(other) == list(first)
            assert other.digest == first.digest
    assert corpora[0].documents("train").digest != corpora[0].documents("valid").digest


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet", "mixture"])
def test_several_documents_are_read_as_each_alone(tmp_path, kind):
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(LINES):
        (tmp_path / "texts" / f"{number:03}").write_text(text, newline="")
    keys: dict[str, Any] = {
        "folder": {"path": str(tmp_path / "texts")},
        "jsonl": {"path": str(write_jsonl(tmp_path / "a.jsonl", LINES))},
        "parquet": {"path": str(write_parquet(tmp_path / "a.parquet", LINES))},
    }
    keys["mixture"] = {"parts": {use: {"use": use, **keys[use]} for use in list(keys)}}
    documents = open_corpus(kind, **keys[kind]).documents("train")
    numbers = np.array([*range(5, len(documents)), 0, 3, 1, 1])
    assert list(texts_of(documents, numbers)) == [documents[number] for number in numbers]
    assert in_any_order(documents) == (kind in {"folder", "jsonl"}), "Parquet decodes whole groups"


def test_neighbours_are_read_from_a_file_that_is_opened_once(tmp_path, monkeypatch):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", LINES) for name in "ab"]
    found = open_corpus("jsonl", path=str(tmp_path / "*.jsonl"), valid_percent=0)
    documents, opened = found.documents("train"), []
    opens = LocalFiles.opened

    def watched(self: LocalFiles, number: int, **keys: Any) -> Any:
        opened.append(number)
        return opens(self, number, **keys)

    monkeypatch.setattr(LocalFiles, "opened", watched)
    assert len(list(texts_of(documents, np.arange(len(documents))))) == len(documents)
    assert opened == list(range(len(files)))


def test_a_document_that_changed_is_named_among_its_neighbours(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(9)])
    documents = open_corpus("jsonl", path=str(path), valid_percent=0).documents("train")
    path.write_text(path.read_text().replace("text 4", "Text 4"))
    texts = texts_of(documents, np.arange(9))
    assert [next(texts) for _ in range(4)] == [b"text %d" % i for i in range(4)]
    with pytest.raises(DataError, match=r"a.jsonl: changed while it was in use; run the command"):
        next(texts)


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary"])
def test_texts_may_be_any_column_of_strings_or_bytes(tmp_path, kind):
    path = write_parquet(tmp_path / "a", LINES, getattr(pa, kind)())
    assert (
        len(list(open_corpus("parquet", path=str(path), valid_percent=0).documents("train"))) == 44
    )


def test_bytes_of_a_column_need_not_be_utf8(tmp_path):
    pq.write_table(pa.table({"code": pa.array([b"\xff\xfe", b"\x00"])}), tmp_path / "a")
    found = open_corpus("parquet", path=str(tmp_path / "a"), text_key="code", valid_percent=0)
    assert list(found.documents("train")) == [b"\xff\xfe", b"\x00"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "bad.jsonl:2: not valid JSON: Expecting ',' delimiter at column 13"),
        (b"[" * 100_000, "bad.jsonl:2: not read: nested too deeply"),
        (b'{"id": ' + b"1" * 5000 + b"}", "bad.jsonl:2: not read: an integer has too many digits"),
        (b'{"text": NaN}', "bad.jsonl:2: 'text' is no string, but float"),
        (
            b'{"body": 1, "id": 2}',
            "bad.jsonl:2: no key 'text' (corpus.text_key); it has 'body', 'id'",
        ),
        (b'["a"]', "bad.jsonl:2: no key 'text' (corpus.text_key); no object"),
        (b'{"text": 7}', "bad.jsonl:2: 'text' is no string, but int"),
        (b'{"text": "\xff"}', "bad.jsonl:2: not UTF-8 text: "),
        (b'{"text": "\\ud800"}', "bad.jsonl:2: 'text' holds half a surrogate pair"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=re.escape(message)):
        open_corpus("jsonl", path=str(tmp_path / "bad.jsonl")).documents("train")


def test_files_of_other_kinds_and_columns_are_refused(tmp_path):
    def refuses(message: str, **keys: Any) -> None:
        with pytest.raises(DataError, match=message):
            open_corpus("parquet", **keys).documents("train")

    file = str(write_parquet(tmp_path / "a.parquet", LINES))
    refuses(r"no column 'txt' \(corpus.text_key\). Did you mean 'text'\?\n  columns: id, text",
            path=file, text_key="txt")  # fmt: skip
    refuses("column 'id' holds int64; texts are string or binary", path=file, text_key="id")
    (tmp_path / "b").write_text("no such thing")
    refuses("b: neither a Parquet file nor an Arrow IPC file", path=str(tmp_path / "b"))
    (tmp_path / "c").write_bytes(Path(file).read_bytes()[:-30])
    refuses(r"c: (damaged|cannot be read): ", path=str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("jsonl", "none.jsonl", "none.jsonl: no such file, and no file matches it as a glob"),
        ("parquet", "*.parquet", "*.parquet: no such file, and no file matches it as a glob"),
        ("jsonl", ".", ".: is a folder; name its files by a glob, as in corpus.path = '*.jsonl'"),
    ],
)
def test_paths_without_a_file_say_what_to_write(tmp_path, monkeypatch, kind, path, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_corpus(kind, path=path)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = str(write_parquet(tmp_path / "a", LINES))
    monkeypatch.setitem(sys.modules, "pyarrow.ipc", None)
    with pytest.raises(ConfigError, match=r"need pyarrow.   fix: pip install 'blt-core\[data\]'"):
        open_corpus("parquet", path=path)


# -- mixtures ------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """A mixture of 40 texts a and 20 texts b, with some weights."""
    a = write_jsonl(tmp_path / "a.jsonl", [f"a {i:03}" for i in range(50)])
    b = write_parquet(tmp_path / "b.parquet", [f"b {i:03}" for i in range(25)])
    parts = {
        "a": {"use": "jsonl", "path": str(a), "valid_percent": 20},
        "b": {"use": "parquet", "path": str(b), "valid_percent": 20},
    }
    return lambda **weights: open_corpus("mixture", parts=parts, weights=weights)


def read_counts(documents: Any, passes: int, shuffle: int) -> list[Counter]:
    """How often each document was read in each pass, which are told apart by their sizes."""
    windows = cut_windows(documents, 64)
    batches = Batches(
        documents, windows, scheme=IdScheme(), batch_bytes=24, seed="s", shuffle_bytes=shuffle
    )
    found, number = [], 0
    for epoch in range(passes):
        counts: Counter = Counter()
        end = sum(
            len(batches._pool(epoch * batches._pools + i).groups) for i in range(batches._pools)
        )
        for _ in range(end):
            for ids, size in zip(
                batches[number].targets_br.tolist(), batches[number].sizes, strict=True
            ):
                counts[bytes(ids[:size])] += 1
            number += 1
        found.append(counts)
    return found


@pytest.mark.parametrize("shuffle", [10**6, 100])
def test_weights_are_passes_over_a_part_and_no_document_is_left_out(mixed, shuffle):
    documents = mixed(a=2.0, b=0.5).documents("train")
    assert len(documents) == 60
    passes = read_counts(documents, 4, shuffle)
    for counts in passes:
        assert {text: n for text, n in counts.items() if text.startswith(b"a")} == {
            text: 2 for text in documents if text.startswith(b"a")
        }
    halves = [{text for text in counts if text.startswith(b"b")} for counts in passes]
    assert [len(half) for half in halves] == [10] * 4
    assert halves[0] | halves[1] == {text for text in documents if text.startswith(b"b")}
    assert halves[0] == halves[2]


def test_parts_hold_out_their_own_documents_each_once(mixed):
    both = mixed(a=2.0, b=0.5)
    train, valid = both.documents("train"), both.documents("valid")
    assert len(valid) == 15
    assert set(train) & set(valid) == set()
    assert valid.source(0) != valid.source(10)
    assert train.digest != mixed(a=1.0).documents("train").digest
    assert valid.digest == mixed().documents("valid").digest


def test_mixtures_may_hold_mixtures(tmp_path, mixed):
    file = str(write_jsonl(tmp_path / "c.jsonl", ["c", "c c"]))
    inner = {
        "use": "mixture",
        "parts": {"x": {"use": "jsonl", "path": file, "valid_percent": 0}},
        "weights": {"x": 3.0},
    }
    outer = open_corpus("mixture", parts={"in": inner}, weights={"in": 0.5})
    assert list(outer.documents("train").weights) == [(2, 1.5)]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"parts": {}}, "corpus.*: parts: a mixture needs at least one corpus"),
        ({}, "corpus.parts: missing; .* under each of some names, a table that names a corpus"),
        ({"parts": {"a": {"use": "folder"}}}, r"corpus\.parts\.a\.path: missing"),
        ({"parts": 3}, r"corpus\.parts: expected a table, got int 3"),
        ({"parts": {"a": {"use": "folder", "path": "."}}, "weights": {"b": 1.0}},
         "weights.b: no such part."),
        ({"parts": {"a": {"use": "folder", "path": "."}}, "weights": {"a": 0.0}},
         "weights: a = 0.0: expected more than 0"),
    ],
)  # fmt: skip
def test_faulty_mixtures_name_the_place(table, message):
    with pytest.raises(ConfigError, match=message):
        open_corpus("mixture", **table)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"


@pytest.mark.parametrize(("use", "name"), [("folder", "a"), ("jsonl", "a"), ("parquet", "a")])
def test_a_pointer_in_place_of_a_corpus_is_named(tmp_path, use, name):
    (tmp_path / name).write_text(POINTER)
    path = tmp_path if use == "folder" else tmp_path / name
    with pytest.raises(DataError, match=r"a(:1)?: a Git-LFS pointer, .*git lfs pull"):
        open_corpus(use, path=str(path)).documents("train")


def test_a_long_text_about_pointers_is_a_text(tmp_path):
    text = POINTER + "is how they begin. " * 60
    (tmp_path / "a").write_text(text)
    found = open_corpus("folder", path=str(tmp_path), valid_percent=0).documents("train")
    assert list(found) == [text.encode()]


def test_what_systems_leave_is_no_document(tmp_path):
    for name in ("a", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_text('{"text": "x"}')
    found = open_corpus("folder", path=str(tmp_path), valid_percent=0).documents("train")
    assert len(found) == 1
    lines = open_corpus("jsonl", path=str(tmp_path / "*"), valid_percent=0).documents("train")
    assert len(lines) == 1


@pytest.mark.parametrize("use", ["folder", "jsonl"])
def test_a_corpus_may_lie_in_the_home_folder(tmp_path, monkeypatch, use):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a").write_text('{"text": "x"}')
    path = "~/texts" if use == "folder" else "~/texts/*"
    for keys in ({"path": path}, {"path": path, "valid_path": path}):
        assert len(open_corpus(use, **keys).documents("train")) == 1
