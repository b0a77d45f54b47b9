"""Who may import whom, held over the syntax trees; docs/architecture.md gives the reasons."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Modules of blt_core from the bottom up; each imports from its own layer and those below.
LAYERS = [
    {"errors", "types", "files"},
    {"protocols"},
    {"component", "hookspecs", "resources", "nn", "published", "log", "faults"},
    {"tables"},
    {"plugins"},
    {"wiring"},
    {"model", "storage"},
    {"decoding"},
    {"requests", "pipeline", "compare"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


class _WithoutTypeChecking(ast.NodeTransformer):
    def visit_If(self, node):
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse
        return self.generic_visit(node)


def imports(path: Path, *, running: bool = False) -> set[str]:
    """Dotted names of all that a file imports; ``from a import b`` gives a and a.b.

    ``running``: only what is imported when the program runs, and not for type checkers alone.
    """
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(_WithoutTypeChecking().visit(tree) if running else tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def core_module(path: Path) -> str:
    return path.relative_to(ROOT / "blt_core").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files("blt_core"), ids=lambda p: str(p.relative_to(ROOT)))
def test_core_imports_only_what_stands_below(path):
    name = core_module(path)
    used = {i.split(".")[1] for i in imports(path, running=True) if i.startswith("blt_core.")}
    used &= RANK.keys()
    if name not in {"__init__", "testing"}:
        assert name in RANK, f"{name} has no layer: add it to LAYERS and docs/architecture.md"
        above = {other for other in used if RANK[other] > RANK[name]}
        assert not above
    assert not any(i.split(".")[0] == "blt_plugins" for i in imports(path))


def test_only_tests_import_the_testing_kit():
    for path in files("blt_core") + files("plugins"):
        if "testing" not in path.parts:
            assert not any(i.startswith("blt_core.testing") for i in imports(path)), path


@pytest.mark.parametrize("path", files("plugins"), ids=lambda p: str(p.relative_to(ROOT)))
def test_plugins_import_no_sibling(path):
    own = path.relative_to(ROOT / "plugins" / "blt_plugins").parts[0]
    siblings = {i.split(".")[1] for i in imports(path) if i.startswith("blt_plugins.")}
    assert siblings <= {own}


@pytest.mark.parametrize("path", files("plugins"), ids=lambda p: str(p.relative_to(ROOT)))
def test_plugins_use_only_public_modules_of_the_core(path):
    private = {i for i in imports(path) if i.startswith("blt_core.") and i.split(".")[1][0] == "_"}
    assert not private
