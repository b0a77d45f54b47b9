"""``blt new-plugin`` makes a distribution of each kind whose tests pass as it is."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from blt_core import Kind, hookimpl
from blt_core.cli.app import run as blt
from blt_core.cli.making import files_of, names_of, template_of, write
from blt_core.errors import BltError, DataError, PluginError
from blt_core.plugins.loading import load_plugins
from tests.core.test_layers import PUBLIC
from tests.packaging.distributions import KIT, ROOT, install, run

PLUGINS = load_plugins()
KINDS = list(PLUGINS.manifest.kinds)
TEMPLATES = sorted((ROOT / "blt_core" / "templates").glob("*.py"))


def make(folder: Path, kind: str, name: str) -> Path:
    names = names_of(name)
    write(folder / name, files_of(names, kind, template_of(PLUGINS, kind)))
    return folder / name


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a distribution of each kind, and where all of them are installed."""
    folder = tmp_path_factory.mktemp("made")
    sources = [make(folder, kind, f"acme-{kind.replace('_', '-')}") for kind in KINDS]
    install(folder / "site", *sources)
    return folder, sources


@pytest.mark.slow
def test_one_of_each_kind_passes_its_own_tests(made):
    folder, sources = made
    tests = [source / "tests" for source in sources]
    options = ("--import-mode=importlib", "-p", "no:cacheprovider", "-v", *KIT)
    code = "import pytest; raise SystemExit(pytest.main())"
    done = run(code, *options, *tests, cwd=folder, paths=[folder / "site"])
    said = done.stdout.decode()
    assert done.returncode == 0, said[-6000:] + done.stderr.decode()
    for kind in KINDS:
        passed = re.findall(rf"\[{kind}\.([\w-]+)\] PASSED", said)
        assert {"builds", "defaults", "described"} < set(passed), kind
    assert said.count("test_the_example_is_a_config PASSED") == len(KINDS)
    assert said.count("SKIPPED") <= len(KINDS), "contracts that hardly any promises"


def test_what_is_made_is_linted_and_formatted(made):
    folder, _ = made
    config = ("--config", ROOT / "pyproject.toml", "--no-cache")
    sources = sorted(folder.glob("*/src"))
    tests = sorted(folder.glob("*/tests"))
    assert len(sources) == len(tests) == len(KINDS)
    for command in (
        ("check", *config, *sources),
        (
            "check",
            "--isolated",
            "--no-cache",
            "--select",
            "E,F,I,W",
            "--line-length",
            "100",
            *tests,
        ),
        ("format", "--check", *config, *sources, *tests),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_template(kind):
    template = template_of(PLUGINS, kind)
    assert f'Component("{kind}", NAME' in template.component
    assert 'NAME = "acme/name"' in template.component
    assert template.command.startswith("blt ")


def test_no_template_is_left_over():
    assert {path.stem for path in TEMPLATES} == {"__init__", *KINDS}


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_import_public_modules_alone(path):
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    used = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    inside = [name for name in used if name.startswith("blt_")]
    public = [*("blt_core." + each for each in PUBLIC)]
    assert [n for n in inside if n != "blt_core" and not n.startswith(tuple(public))] == []


# -- the command ----------------------------------------------------------------------------------


def test_the_command_says_what_to_do_next(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert blt(["new-plugin", "blt-acme-tree", "--kind", "drafter"]) == 0
    said = capfd.readouterr().out
    assert "blt-acme-tree: drafter 'acme/tree', in src/blt_acme_tree/plugin.py" in said
    assert "blt plugins test drafter acme/tree" in said
    found = {str(p.relative_to(tmp_path / "blt-acme-tree")) for p in tmp_path.rglob("*.*")}
    assert {"pyproject.toml", "README.md", ".github/workflows/test.yml", ".gitignore"} < found
    assert sorted(each.name for each in tmp_path.iterdir()) == ["blt-acme-tree"]


def test_it_is_where_output_says(tmp_path):
    folder = tmp_path / "there"
    assert blt(["new-plugin", "acme", "--kind", "corpus", "--output", str(folder)]) == 0
    assert (folder / "src" / "acme" / "plugin.py").is_file()
    assert '"acme"' in (folder / "src" / "acme" / "plugin.py").read_text()


@pytest.mark.parametrize(
    ("name", "kind", "error"),
    [
        ("acme-tree", "draftr", "no kind named 'draftr'. Did you mean 'drafter'?"),
        ("acme tree", "drafter", "'acme tree': expected a name such as acme-tree"),
        ("-acme", "drafter", "expected a name such as acme-tree"),
        ("../acme", "drafter", "expected a name such as acme-tree"),
        ("json", "drafter", "'json': Python has a module 'json' already; choose another name"),
        ("class", "drafter", "Python has a module 'class' already"),
        ("blt-core", "drafter", "'blt-core' is blt-core's own"),
        ("lookup", "drafter", "there is a drafter 'lookup' already (blt-core)"),
    ],
)
def test_bad_names_are_refused(name, kind, error, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert blt(["new-plugin", "--kind", kind, "--", name]) == 2
    assert error in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_left_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "acme-tree").mkdir()
    with pytest.raises(DataError, match="exists already; choose another --output"):
        make(tmp_path, "drafter", "acme-tree")
    with pytest.raises(DataError, match=r"the folder .* does not exist"):
        make(tmp_path / "missing", "drafter", "acme-tree")
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(DataError, match="cannot be written: full"):
        make(tmp_path, "drafter", "acme-other")
    assert [each.name for each in tmp_path.iterdir()] == ["acme-tree"]


# -- kinds of plugins -----------------------------------------------------------------------------


def zoo(template: str):
    class Plugin:
        @hookimpl
        def blt_kinds(self):
            protocol = "blt_core.protocols:CostModel"
            return {"zoo": Kind(protocol, "of a plugin", template=template)}

    return load_plugins(extra=[("blt-zoo", "zoo", Plugin())])


def test_a_kind_of_a_plugin_brings_its_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "zoo_template.py").write_text('NAME = "acme/name"\n')
    (tmp_path / "zoo_template.toml").write_text("# blt run acme/name\n")
    assert template_of(zoo("zoo_template"), "zoo").command == "blt run acme/name"
    (tmp_path / "zoo_template.toml").write_text("# blt run it\n")
    with pytest.raises(PluginError, match=r"zoo_template.toml names no 'acme/name'"):
        template_of(zoo("zoo_template"), "zoo")


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("", 'has no template\n  fix, in the plugin that declares it: Kind\\(…, template="'),
        ("nowhere.at_all", "the template of 'zoo', nowhere.at_all, is not there"),
        ("nowhere_at_all", "the template of 'zoo', nowhere_at_all, is not there"),
    ],
)
def test_a_kind_without_a_template_says_so(template, error):
    with pytest.raises(BltError, match=error):
        template_of(zoo(template), "zoo")


def test_making_one_imports_no_template():
    assert importlib.util.find_spec("blt_core.templates.patcher") is not None
    code = "import sys\nfrom blt_core.cli.app import run\n"
    code += "assert run(['new-plugin', '--help']) == 0 and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300)
