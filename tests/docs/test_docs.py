"""What the documentation shows works, and what exists is documented."""

from __future__ import annotations

import re
import types
from functools import cache
from pathlib import Path

import pytest

from blt_core import hookspecs
from blt_core.cli.app import run
from blt_core.loading import DEFAULTS, plan_run
from blt_core.pipeline import Pipeline
from blt_core.plugins.commands import find_commands
from blt_core.plugins.loading import load_plugins
from blt_core.plugins.registry_file import load_manifest
from blt_core.requests import REQUEST_KEYS
from blt_core.wiring.config import Config
from blt_core.wiring.resolve import resolve_component
from tests.tiny import config

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "docs" / "tutorials").glob("*.md"),
        *ROOT.glob("benchmarks/*.md"),
    ]
)
SOURCES = ("blt_core", "plugins", "benchmarks")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", read(name), re.DOTALL)


def test_every_hook_is_documented():
    page = read("docs/plugins.md")
    hooks = [name for name in vars(hookspecs) if name.startswith("blt_")]
    assert len(hooks) >= 6
    for hook in hooks:
        assert f"`{hook}(" in page, hook


def test_the_plugin_of_the_tutorial_is_a_lossless_sampler():
    [source] = [code for code in blocks("docs/plugins.md", "python") if "class Echo" in code]
    module = types.ModuleType("blt_acme")
    exec(source, vars(module))
    plugins = load_plugins(extra=[("blt-acme", "acme", module)])
    assert plugins.broken == ()
    pipeline = Pipeline.load(Config.from_mapping(config()), plugins)
    echo = pipeline.with_sampler("speculative drafter.use=acme/echo drafter.draft_bytes=2")
    expected = pipeline.generate("x = ", max_new_bytes=30)
    result = echo.generate("x = ", max_new_bytes=30)
    assert result.output == expected.output
    assert result.drafted > 0


def test_the_config_of_the_documentation_resolves():
    import tomli

    [whole, *_] = blocks("docs/configuration.md", "toml")
    plan, _ = plan_run(Config.from_mapping(tomli.loads(whole)), load_plugins())
    assert plan.node("sampler").name == "speculative"


def test_the_corpora_of_the_documentation_resolve():
    import tomli

    tables = [tomli.loads(code).get("corpus") for code in blocks("docs/data.md", "toml")]
    names = [table["use"] for table in tables]
    assert names == ["folder", "jsonl", "parquet", "mixture", "parquet", "prepared", "prepared"]
    for table in tables:
        resolve_component("corpus", table, load_plugins())


def test_the_ten_lines_of_the_readme_run(capsys):
    [source] = [code for code in blocks("README.md", "python") if "stream_text" in code]
    assert len(source.strip().splitlines()) <= 14
    exec(source, {})
    assert capsys.readouterr().out.rstrip().endswith("GB")


def test_the_program_of_the_python_page_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = blocks("docs/python.md", "python")
    assert len(parts) >= 8
    namespace: dict[str, object] = {}
    for source in parts:  # one program: later blocks use the names of earlier ones
        exec(source, namespace)
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("eight ") for line in printed)
    assert sum(line.startswith("1 (b") for line in printed[-3:]) >= 1  # the watcher's
    assert namespace["rows"][1].identical or namespace["rows"][1].near_ties


def test_the_python_page_names_every_setting_and_every_way_to_ask():
    page = read("docs/python.md")
    for key in REQUEST_KEYS:
        assert f"| `{key}` |" in page, key
    for name in ("generate", "stream", "stream_text", "steps", "check"):
        assert f"| `{name}(" in page, name
    assert "(docs/python.md)" in read("README.md")


def test_every_command_is_documented():
    commands = find_commands(load_manifest())
    page = read("docs/cli.md")
    assert len(commands) >= 10
    for name in commands:
        assert f"blt {name}" in page, name


def test_every_field_of_the_json_output_is_documented(tmp_path):
    from blt_core.cli.comparing import as_report
    from blt_core.compare import compare

    pipeline = Pipeline.from_config(config())
    rows = compare(pipeline, {"ar": "ar"}, ["x"], max_new_bytes=4)
    report = as_report(rows, 1, pipeline.parameter_counts, pipeline)
    page = read("docs/cli.md")
    for field in [*rows[0].results[0].to_dict(), *report, *report["samplers"][0]]:
        assert re.search(rf"[`\"]{field}[`\"]", page), field


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_of_the_repository_that_a_page_names_exist(page):
    folders = "blt_core|plugins|configs|benchmarks|scripts|docs|tests"
    named = re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*\w", page.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_classes_and_functions_that_a_page_names_exist(page):
    named = re.findall(r"`(?:\w+\.)*([A-Z]\w*[a-z]\w*|\w+(?=\())", page.read_text(encoding="utf-8"))
    assert [name for name in named if name not in source_words()] == []


@cache
def source_words() -> frozenset[str]:
    """All names in the code, and in the settings it ships."""
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")]
    return frozenset(re.findall(r"\w+", "".join(path.read_text("utf-8") for path in files)))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_placeholder_is_left(page):
    assert "@@" not in page.read_text(encoding="utf-8")


def test_shipped_configs_resolve():
    for path in sorted((ROOT / "configs").glob("*.toml")):
        # Those need a corpus, these a downloaded folder; other tests run them.
        if path.stem.startswith(("train", "quickstart")) or path.stem.endswith("-hf"):
            continue
        from blt_core.wiring.config import load_config

        plan, _ = plan_run(load_config(path), load_plugins())
        assert plan.nodes.keys() >= DEFAULTS.keys(), path


def test_a_contract_is_printed_by_its_name(capsysbinary):
    assert run(["docs", "drafter.limit"]) == 0
    found = capsysbinary.readouterr().out.decode()
    assert found.startswith("# drafter.limit\n")
    assert "at most `limit[b]` ids" in found
    assert "##" not in found
    assert run(["docs", "drafter.limits"]) != 0
    assert "Did you mean 'limit'?" in capsysbinary.readouterr().err.decode()
