"""Small corpora of each kind, and what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blt_core.component import BuildContext
from blt_core.plugins.loading import load_plugins
from blt_core.wiring.resolve import build_node, resolve_component
from blt_plugins.training.corpora.folder import FileReader
from blt_plugins.training.corpora.jsonl import LineReader
from blt_plugins.training.corpora.parquet import RowReader


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


def told(corpus: Any) -> dict[str, Any]:
    return {
        split: (found.digest, list(found), [found.source(i) for i in range(len(found))])
        for split in ("train", "valid")
        for found in [corpus.documents(split)]
    }
