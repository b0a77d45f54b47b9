"""Metadata in whatever state: faults are told with their distribution, the others are found."""

from __future__ import annotations

from importlib import metadata

import pytest

from blt_core.errors import PluginError
from blt_core.plugins.entry_points import PLUGINS, find

GOOD = {PLUGINS: {"it": "good_plugin"}}


@pytest.fixture
def found(install):
    """The points and faults that are found beside one good distribution."""

    def found() -> tuple[list[str], list[str]]:
        install("good", GOOD)
        result = find(PLUGINS)
        return [str(p.origin) for p in result.points], [str(b) for b in result.broken]

    return found


MALFORMED = "entry_points.txt is malformed; expected lines 'name = module:object'"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("[other.group]\nacme\n", MALFORMED),
        (f"[{PLUGINS}]\nacme\n", MALFORMED),
        (b"\xff\xfe", "entry_points.txt is not UTF-8 text: invalid start byte"),
        (
            f"[{PLUGINS}]\n= acme\n",
            f"entry_points.txt has an entry point without a name in [{PLUGINS}]",
        ),
    ],
)
def test_a_malformed_file_of_entry_points(install, found, text, cause) -> None:
    install("bad", {}, info={"entry_points.txt": text})
    assert found() == (["plugin 'it' (good)"], [f"distribution 'bad' is broken: {cause}"])


@pytest.mark.parametrize("text", [None, b"\xff\xfe", "Version: 1.0\n", ""])
def test_damaged_metadata_of_a_plugin(install, found, text) -> None:
    install("bad", GOOD, info={"METADATA": text})
    points, broken = found()
    assert points == ["plugin 'it' (good)"]
    cause = "its METADATA is missing, damaged or without a Name; install it again"
    assert broken == [f"distribution 'bad' is broken: {cause}"]


def test_damaged_metadata_of_what_is_no_plugin_is_no_concern(install, found) -> None:
    install("bad", {}, info={"METADATA": None, "entry_points.txt": None})
    install("worse", {"other": {"x": "y"}}, info={"METADATA": b"\xff"})
    assert found() == (["plugin 'it' (good)"], [])


def test_a_distribution_that_is_one_file(install, found, tmp_path) -> None:
    (tmp_path / "site" / "old.egg-info").write_text("Metadata-Version: 1.0\nName: old\n")
    (tmp_path / "site" / "odd-1.0-py3.11.egg-info").write_bytes(b"\xff")
    assert found() == (["plugin 'it' (good)"], [])


def test_a_file_of_entry_points_that_cannot_be_read(install, found) -> None:
    home = install("bad", {}, info={"entry_points.txt": None})
    (home / "entry_points.txt").mkdir()
    points, [broken] = found()
    assert points == ["plugin 'it' (good)"]
    assert broken.startswith("distribution 'bad' is broken: IsADirectoryError: ")


@pytest.mark.parametrize("name", ["Blt_Acme", "blt-acme"])
def test_the_first_of_several_versions_counts(install, tmp_path, monkeypatch, name) -> None:
    install("blt_acme", {PLUGINS: {"new": "acme"}})
    stale = install(name, {PLUGINS: {"old": "acme"}}, folder=tmp_path / "stale")
    real = metadata.PathDistribution.discover
    paths = [str(tmp_path / "site"), str(stale.parent)]
    monkeypatch.setattr(metadata, "distributions", lambda: real(path=paths))
    result = find(PLUGINS)
    assert [p.origin.entry_point for p in result.points] == ["new"]
    assert result.broken == ()
    paths.reverse()
    assert [p.origin.entry_point for p in find(PLUGINS).points] == ["old"]


@pytest.mark.parametrize("value", ["", "a b", "module:", "1x", ":x", "a..b", "a:b c", "a:1"])
def test_a_value_that_is_no_import_path(install, value) -> None:
    install("acme", {PLUGINS: {"it": value}})
    [point] = find(PLUGINS).points
    with pytest.raises(PluginError) as caught:
        point.load()
    assert str(caught.value) == (
        f"its entry point is {value!r}; expected 'package.module' or 'package.module:object'"
    )


def test_values_lead_to_modules_and_what_is_in_them(install) -> None:
    install(
        "acme",
        {PLUGINS: {"a": "acme_m", "b": "acme_m : C.d", "c": "acme_m:C [extra]", "d": "acme_m:No"}},
        {"acme_m": "class C:\n d = 4\n"},
    )
    a, b, c, d = find(PLUGINS).points
    assert (a.load().__name__, b.load(), c.load().d) == ("acme_m", 4, 4)
    with pytest.raises(PluginError, match=r"^acme_m has no 'No'$"):
        d.load()
