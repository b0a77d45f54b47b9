"""Which versions of DeepSpeed are allowed, and what is said of others and of none."""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tomli
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from blt_core.component import BuildContext
from blt_core.errors import PluginError
from blt_plugins.deepspeed.backend import DeepSpeedBackend
from blt_plugins.deepspeed.process import import_deepspeed
from blt_plugins.deepspeed.settings import DeepSpeedBackendParams
from blt_plugins.deepspeed.versions import FIX, OLDEST, TESTED, warn_untested

ROOT = Path(__file__).resolve().parents[2]
DOC = ROOT / "docs" / "distributed.md"
OUTSIDE = "0.99.0"


@pytest.fixture(autouse=True)
def nothing_was_said():
    warn_untested.cache_clear()
    yield
    warn_untested.cache_clear()


@pytest.fixture
def another(monkeypatch):
    """As if a version were installed that is newer than what is tested."""
    monkeypatch.setattr(metadata, "version", lambda _: OUTSIDE)


@pytest.mark.parametrize("extra", ["deepspeed", "test"])
def test_the_extras_install_what_is_tested(extra):
    project = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = map(Requirement, project["optional-dependencies"][extra])
    (found,) = (each for each in wanted if each.name == "deepspeed")
    assert found.specifier == SpecifierSet(TESTED)


def test_what_ci_installs_and_what_is_installed_here_are_tested():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    (pinned,) = (each for each in lines if each.startswith("deepspeed=="))
    for version in (pinned.removeprefix("deepspeed=="), metadata.version("deepspeed")):
        assert version in SpecifierSet(TESTED)


def test_the_docs_name_the_range_and_rows_of_versions_in_it():
    text = DOC.read_text()
    assert f"`{TESTED}`" in text
    table = text.split("| DeepSpeed | ", 1)[1].split("\n\n", 1)[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    tested = [each for each in rows if each in SpecifierSet(TESTED)]
    pinned = "deepspeed==" + tested[-1]
    assert pinned in (ROOT / "constraints.txt").read_text().splitlines()
    assert tested[0] == OLDEST  # the range begins with a version that has a row


def test_a_newer_version_is_warned_of_once_on_stderr(another, capsys):
    warn_untested()
    warn_untested()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("has not been tested") == 1
    assert OUTSIDE in err
    assert TESTED in err


def test_a_newer_version_is_no_error(another):
    DeepSpeedBackend(DeepSpeedBackendParams(), BuildContext())


def test_processes_other_than_the_first_say_nothing(another, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    warn_untested()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("version", ["0.19.0", "0.19.8", "0.19.8+abcdef"])
def test_a_tested_version_is_not_warned_of(monkeypatch, capsys, version):
    monkeypatch.setattr(metadata, "version", lambda _: version)
    warn_untested()
    assert capsys.readouterr().err == ""


def test_a_version_that_cannot_be_imported_is_an_error_that_names_what_is_tested(
    tmp_path, another, monkeypatch
):
    (tmp_path / "deepspeed.py").write_text("from torch import what_torch_no_longer_has")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(PluginError) as caught:
        import_deepspeed(torch.device("cpu"))
    message = str(caught.value)
    assert f"DeepSpeed {OUTSIDE} cannot be imported with torch {torch.__version__}" in message
    assert "what_torch_no_longer_has" in message
    assert FIX in message
    assert TESTED in FIX


@pytest.mark.parametrize("version", ["0.15.4", "0.18.0", "0.18.9"])
def test_an_older_version_is_refused(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda _: version)
    with pytest.raises(PluginError) as caught:
        DeepSpeedBackend(DeepSpeedBackendParams(), BuildContext())
    message = str(caught.value)
    assert f"needs DeepSpeed {OLDEST} or newer; {version} is installed" in message
    assert FIX in message


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PluginError, match=r"not installed\n.*pip install 'blt-core\[deepspeed\]'"):
        DeepSpeedBackend(DeepSpeedBackendParams(), BuildContext())
