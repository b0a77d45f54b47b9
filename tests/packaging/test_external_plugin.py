"""A third party's distribution beside the wheel of blt-core, where no checkout is."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

from tests.core.test_layers import PUBLIC
from tests.nightly import nightly_or
from tests.packaging.distributions import KIT, ROOT, Environment, wheel_of

EXTERNAL = ROOT / "tests" / "external_plugin"
#: First-party plugins that are lifted out of blt-core; a nightly run lifts more.
LIFTED = {
    "cost": ("-k", "cost_model"),
    **nightly_or(
        {},
        {
            "unmasking": ("-k", "unmasking"),
            "patching": ("-k", "patcher or byte_scorer"),
            "verification": ("-k", "verification"),
        },
    ),
}
PROBE = """
import json, sys
from importlib import metadata
import blt_core, blt_plugins
print(json.dumps({
    "path": sys.path,
    "files": [blt_core.__file__, blt_plugins.__file__],
    "names": sorted(d.name for d in metadata.distributions() if d.name.startswith("blt")),
}))
"""


def copied(folder: Path, source: Path) -> Path:
    """A source folder without what tools left in it, away from the checkout."""
    ignored = shutil.ignore_patterns("__pycache__", ".*_cache", ".hypothesis")
    return Path(shutil.copytree(source, folder / source.name, ignore=ignored))


@pytest.fixture(scope="module")
def core(tmp_path_factory) -> Path:
    """The wheel of blt-core."""
    return wheel_of(tmp_path_factory.mktemp("core"), ROOT)


@pytest.fixture(scope="module")
def external(core, tmp_path_factory):
    """An environment with two wheels in it, and the distribution's folder, away from here."""
    folder = tmp_path_factory.mktemp("external")
    source = copied(folder, EXTERNAL)
    environment = Environment.new(folder)
    environment.install(core, wheel_of(folder / "wheels", source))
    shutil.rmtree(source / "src")  # what is imported is what is installed
    yield environment, source
    environment.close()


@pytest.mark.slow
def test_nothing_of_the_checkout_is_seen(external):
    environment, folder = external
    found = json.loads(environment.python_prints(folder, PROBE))
    assert found["names"] == ["blt-acme", "blt-core"]
    assert not any(Path(each).is_relative_to(ROOT) for each in found["path"] + found["files"])


@pytest.mark.slow
def test_its_own_tests_pass(external):
    environment, folder = external
    options = ("-v", "-p", "no:cacheprovider", *KIT)
    said = environment.pytest(folder, *options)
    for kind in ("drafter", "patcher", "global_model", "cost_model"):
        assert said.count(f"[{kind}.") > 6
    assert "plugins of blt-acme 1.2.3, blt-core" in said


@pytest.mark.slow
def test_the_kit_tries_it_from_the_command_line(external):
    environment, folder = external
    said = environment.blt(folder, "plugins", "test", "cost_model", "acme/energy")
    assert "cost_model 'acme/energy': 8 contracts hold, 0 are broken" in said


@pytest.mark.slow
def test_its_config_generates_and_its_observer_sees_it(external, tmp_path):
    environment, folder = external
    log = tmp_path / "log.jsonl"
    given = ("generate", "tree.toml", "--prompt", "def main():\n    x = 1\n    x =", "--json")
    result = json.loads(environment.blt(folder, *given, ACME_LOG=str(log)))
    assert (result["cost_unit"], result["gigabytes"]) == ("J", None)
    assert result["cost"] > 0
    assert result["drafted"] > 0
    [line] = map(json.loads, log.read_text().splitlines())
    assert line["bytes"] == [len(result["ids"])]
    assert line["steps"] >= result["rounds"] > 0


@pytest.mark.slow
def test_its_unit_stands_above_the_columns(external):
    environment, folder = external
    samplers = ("--sampler", "ar", "--sampler", "speculative drafter.use=acme/tree")
    prompt = ("--prompt", "def main():\n    x = 1\n    x =", "--max-new-bytes", "40")
    said = environment.blt(folder, "compare", "tree.toml", *samplers, *prompt)
    head, ar, tree, *_ = said.splitlines()
    assert re.search(r"\bJ +rel\. J\b", head)
    assert "GB" not in said
    assert ar.split()[0] == "ar"
    assert tree.split()[:3] == ["speculative", "40", "yes"], "its bytes are ar's"
    table = environment.blt(folder, "cost", "--cost-model", "acme/energy picojoules_per_byte=10")
    assert "computed J" in table
    priced = ("--n-dec", "512", "--n-enc", "128", "--json")
    found = json.loads(environment.blt(folder, "cost", "--cost-model", "acme/energy", *priced))
    assert found["cost_unit"] == "J"
    assert found["cost"] == pytest.approx(sum(found["lines"].values()))


@pytest.mark.slow
def test_its_parts_make_a_model_and_its_command_counts_it(external):
    environment, folder = external
    assert "Count the parameters of a model" in environment.blt(folder, "--help")
    counts = json.loads(environment.blt(folder, "acme-count", "gru.toml", "--json"))
    assert counts["global_model"] == 2 * 3 * (32 * 32 + 32) + 32 * 32 + 32
    assert 'use = "acme/commas"' in environment.blt(folder, "check", "gru.toml")


@pytest.mark.parametrize("path", sorted(EXTERNAL.rglob("*.py")), ids=lambda path: path.stem)
def test_it_imports_public_modules_alone(path):
    own = "testing" if path.parent.name == "tests" else "hookspecs"
    public = tuple(f"blt_core.{each}" for each in (*PUBLIC, own))
    tree = ast.parse(path.read_text("utf-8"))
    used = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    used |= {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    inside = {name for name in used if (name or "").split(".")[0] in ("blt_core", "blt_plugins")}
    assert {name for name in inside if name != "blt_core" and not name.startswith(public)} == set()


# -- a plugin of ours, lifted out ----------------------------------------------------------------

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "blt-lifted"
version = "1.0"
dependencies = ["blt-core"]
[tool.hatch.build.targets.wheel]
packages = ["src/blt_lifted"]
[project.entry-points.blt_core]
lifted = "blt_lifted.plugin"
"""


def lift(plugin: str, folder: Path) -> Path:
    """A distribution of one plugin folder, in a package of its own, with its commands."""
    source = ROOT / "plugins" / "blt_plugins" / plugin
    package = folder / "lifted" / "src" / "blt_lifted"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in package.rglob("*.py"):
        path.write_text(path.read_text("utf-8").replace(f"blt_plugins.{plugin}", "blt_lifted"))
    ours = (ROOT / "pyproject.toml").read_text("utf-8")
    commands = re.findall(rf'^(\w+) = "blt_plugins\.{plugin}\.(.+:.+)"$', ours, re.MULTILINE)
    text = PYPROJECT + '[project.entry-points."blt_core.commands"]\n'
    text += "".join(f'{name} = "blt_lifted.{place}"\n' for name, place in commands)
    (folder / "lifted" / "pyproject.toml").write_text(text)
    return folder / "lifted"


def without(plugin: str, site: Path) -> None:
    """Take a plugin out of an installed blt-core: its folder and its entry points."""
    shutil.rmtree(site / "blt_plugins" / plugin)
    [points] = site.glob("blt_core-*.dist-info/entry_points.txt")
    lines = points.read_text().splitlines()
    kept = [line for line in lines if f"blt_plugins.{plugin}." not in line]
    assert len(kept) < len(lines)
    points.write_text("\n".join(kept) + "\n")


@pytest.fixture
def emptied(tmp_path):
    """An environment with nothing of ours in it."""
    made = Environment.new(tmp_path)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("plugin", LIFTED)
def test_a_plugin_of_ours_is_lifted_out(plugin, core, emptied, tmp_path):
    environment = emptied
    environment.install(core, wheel_of(tmp_path / "wheels", lift(plugin, tmp_path)))
    without(plugin, environment.site)
    tests = shutil.copy(ROOT / "tests" / "conformance" / "test_first_party.py", tmp_path)
    options = ("-p", "no:cacheprovider", "-v", *KIT, *LIFTED[plugin], tests)
    said = environment.pytest(tmp_path, *options)
    assert "test_it_keeps_its_contracts[" in said
    assert " passed" in said
    listed = json.loads(environment.blt(tmp_path, "plugins", "--json"))
    assert listed["broken"] == []
    suppliers = [each["distribution"] for each in listed["components"]]
    assert suppliers.count("blt-lifted") >= said.count("PASSED") > 0
    if plugin == "cost":
        assert "BLT-D-4" in environment.blt(tmp_path, "cost")
        given = ("generate", "demo", "--prompt", "x", "--max-new-bytes", "2", "--json")
        assert json.loads(environment.blt(tmp_path, *given))["cost_unit"] == "GB"
