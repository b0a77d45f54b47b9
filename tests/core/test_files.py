"""What files hold that others wrote: every oddity is read, or named with its fix."""

from __future__ import annotations

import os

import pytest

from blt_core.files import decode, expand_home, is_dross, is_stray, names_in, parse_json, read_json

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{}".encode("utf-16"), "UTF-16 text, not UTF-8; save it as UTF-8"),
        ("{}".encode("utf-32"), "UTF-32 text, not UTF-8"),
        ('{"a": 1}'.encode("utf-16-be"), "UTF-16 or UTF-32 text, not UTF-8"),
        (b'{"a": "\xff"}', "not UTF-8 text: invalid start byte at byte 7; save it as UTF-8"),
        (POINTER, "a Git-LFS pointer, .*git lfs pull"),
        (b"\n<!DOCTYPE HTML><p>Log in</p>", "an HTML page, not the file itself"),
        (b'{"a": }', "not valid JSON: Expecting value at column 7"),
        (b'{"a":\n}', "not valid JSON: Expecting value at line 2 column 1"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "an integer has too many digits"),
    ],
)
def test_json_that_cannot_be_read_says_why(data, message) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(data)


def test_a_byte_order_mark_is_no_part_of_a_text() -> None:
    assert decode(b"\xef\xbb\xbfx = 1") == "x = 1"
    assert parse_json(b'\xef\xbb\xbf{"a": 1}\n') == {"a": 1}


def test_json_files_are_no_deeper_than_configs(tmp_path) -> None:
    (tmp_path / "a.json").write_text("[" * 51 + "]" * 51)
    with pytest.raises(ValueError, match="nested more than 50 levels deep"):
        read_json(tmp_path / "a.json")


def test_strays_are_known_by_their_names(tmp_path) -> None:
    dross = [".DS_Store", "._model", "Thumbs.db", "desktop.ini", ".nfs000123"]
    edits = ["config.toml~", ".config.toml.swp", "#config.toml#", ".#config.toml"]
    own = ["config.toml", ".hidden", "model-00000001", "notes.txt"]
    assert all(map(is_dross, dross))
    assert not any(map(is_dross, edits + own))
    assert all(map(is_stray, dross + edits))
    for name in dross + edits + own:
        (tmp_path / name).touch()
    assert names_in(tmp_path) == set(own)
    assert names_in(tmp_path / "gone") == set()


def test_only_a_tilde_at_the_beginning_is_a_home(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home("~/models") == os.path.join("/home/me", "models")  # noqa: PTH118
    for path in ("demo:python", "a/~/b", "~nobody-of-this-name/x"):
        assert expand_home(path) == path
