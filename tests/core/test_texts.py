"""Which files of a folder are meant as texts."""

from __future__ import annotations

import errno
import os

import pytest

from blt_core.storage.texts import visible_files

FILES = ("a.txt", "b/c.txt", "b/d/e.txt", "b/d/f", ".env/lib/g.txt", "b/.git/h.txt", "b/.i.txt")


@pytest.fixture
def folder(tmp_path):
    top = tmp_path / "top"
    for name in FILES:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    (top / "link").symlink_to(top / "b")
    (top / "linked.txt").symlink_to(top / "a.txt")
    return top


@pytest.mark.parametrize(
    "pattern",
    ["**/*", "**/*.txt", "**/d/*", "**/**/*.txt", "*", "**", "b/**/*", "**/*/", "**/.git/*"],
)
def test_files_are_those_that_match_and_are_not_hidden(folder, pattern, monkeypatch):
    found = visible_files(folder, pattern)
    monkeypatch.setattr("blt_core.storage.texts._anywhere", lambda _: None)
    assert visible_files(folder, pattern) == found
    assert (pattern in {"**", "**/*/"}) == (not found)


def test_hidden_folders_are_not_walked(folder, monkeypatch):
    walked = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path=".": walked.append(str(path)) or scandir(path))
    names = {path.relative_to(folder).as_posix() for path in visible_files(folder, "**/*")}
    assert {"a.txt", "b/d/e.txt"} < names
    assert walked
    assert not any(".env" in each or ".git" in each for each in walked)


def test_what_cannot_be_looked_at_is_passed_over(folder, monkeypatch):
    found = visible_files(folder, "**/*")
    (folder / "circle.txt").symlink_to(folder / "circle.txt")
    (folder / "through.txt").symlink_to(folder / "a.txt" / "x")
    assert visible_files(folder, "**/*") == found
    scandir = os.scandir

    def scan(path: str) -> object:
        if path.endswith("d"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert visible_files(folder, "**/*") == [each for each in found if each.parent.name != "d"]
