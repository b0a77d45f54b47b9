"""A cache folder of each test's own, indexes of small corpora, and what was read to make them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blt_plugins.training.corpora import index_file, sources
from blt_plugins.training.corpora.index import Part
from tests.training.index.texts import READERS


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "blt-core"


@pytest.fixture
def eager(monkeypatch):
    """Indexes of small corpora are kept too, and files of this moment are trusted."""
    monkeypatch.setattr(index_file, "SMALL_FILES", 0)
    monkeypatch.setattr(sources, "SETTLED", -(10**12))


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
