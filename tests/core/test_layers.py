"""Who may import whom, held over the syntax trees; docs/architecture.md gives the reasons."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: The rooms of blt_core (its packages, and modules that stand alone), each with those that it may
#: import when it runs. They stand above one another: a room imports from those before it.
CORE = {
    "errors": "",
    "files": "",
    "log": "",
    "faults": "errors",
    "execution": "errors faults",
    "resources": "errors",
    "types": "errors",
    "protocols": "",
    "caches": "",
    "hookspecs": "",
    "component": "errors types",
    "nn": "errors types",
    "published": "types",
    "pricing": "faults types",
    "model": "protocols types",
    "likelihood": "",
    "decoding": "errors faults types protocols nn model likelihood",
    "tables": "errors files component",
    "plugins": "errors files log resources hookspecs component tables",
    "wiring": "errors files faults types protocols component tables plugins",
    "storage": "errors files log protocols model wiring",
    "kernels": "errors files log nn storage",
    "capturing": "log nn",
    "compiling": "log nn storage kernels capturing",
    "loading": "errors log protocols component model plugins wiring storage kernels compiling",
    "scoring": "errors types model likelihood",
    "requests": "errors types component decoding tables wiring",
    "pipeline": "errors types protocols component model likelihood decoding scoring tables "
    "pricing plugins wiring kernels loading requests",
    "batch_inference": "errors faults execution files types storage pipeline",
    "compare": "errors types model decoding requests pipeline",
    "cli": "errors files log faults resources types component published model tables plugins "
    "wiring storage kernels loading requests pipeline batch_inference compare",
    "evaluation": "errors files faults execution component types model tables wiring storage "
    "requests pipeline compare cli",
}
#: The rooms of the training plugin.
TRAINING = {
    "corpora": "",
    "setup": "",
    "backends": "",
    "data": "corpora setup",
    "objectives": "setup data",
    "scores": "data objectives",
    "planning": "setup backends data objectives scores",
    "run": "corpora setup backends data objectives scores",
    "cli": "setup data scores planning run",
    "plugin": "corpora setup backends objectives",
}
HOUSES = {
    "blt_core": (ROOT / "blt_core", CORE),
    "blt_plugins.training": (ROOT / "plugins" / "blt_plugins" / "training", TRAINING),
}
#: What plugins import of blt_core; the rest may change with any version.
PUBLIC = (
    *("component", "hookspecs", "protocols", "caches", "types", "errors", "faults", "files"),
    *("log", "nn", "model"),
    *(
        "decoding.drafting",
        "decoding.denoising",
        "decoding.following",
        "storage",
        "tables.inline",
        "tables.place",
        "plugins.loading",
    ),
    *("wiring", "loading", "pipeline", "batch_inference", "published", "cli", "evaluation"),
    "pricing",
    "execution",
)


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


def room(path: Path, house: Path) -> str:
    return path.relative_to(house).parts[0].removesuffix(".py")


@pytest.mark.parametrize("house", HOUSES)
def test_rooms_stand_above_one_another(house):
    rooms = HOUSES[house][1]
    for number, (name, below) in enumerate(rooms.items()):
        assert set(below.split()) <= set([*rooms][:number]), name


@pytest.mark.parametrize("house", HOUSES)
def test_a_room_imports_no_more_than_it_says(house):
    folder, rooms = HOUSES[house]
    used: dict[str, set[str]] = {name: set() for name in rooms}
    for path in sorted(folder.rglob("*.py")):
        name = room(path, folder)
        if name in {"__init__", "testing", "templates"}:  # the last are copied, never imported
            continue
        assert name in rooms, f"{name} has no place: add it here and to docs/architecture.md"
        own = {i for i in imports(path, running=True) if i.startswith(f"{house}.")}
        parts = {i.removeprefix(f"{house}.").split(".")[0] for i in own}
        used[name] |= parts & rooms.keys() - {name}
    assert used == {name: set(below.split()) for name, below in rooms.items()}


@pytest.mark.parametrize("path", files("blt_core"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_knows_no_plugin(path):
    assert not any(i.split(".")[0] == "blt_plugins" for i in imports(path))


#: What runs the conformance kit besides tests: ``blt plugins test``, and pytest.
RUNS_THE_KIT = {"blt_core/cli/trying.py", "plugins/pytest_blt/__init__.py"}


def test_only_what_runs_the_testing_kit_imports_it():
    for path in files("blt_core") + files("plugins"):
        if "testing" not in path.parts and str(path.relative_to(ROOT)) not in RUNS_THE_KIT:
            assert not any(i.startswith("blt_core.testing") for i in imports(path)), path


@pytest.mark.parametrize(
    "path", files("plugins/blt_plugins"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_plugins_import_no_sibling(path):
    own = path.relative_to(ROOT / "plugins" / "blt_plugins").parts[0]
    siblings = {i.split(".")[1] for i in imports(path) if i.startswith("blt_plugins.")}
    assert siblings <= {own}


@pytest.mark.parametrize(
    "path", files("plugins/blt_plugins"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_plugins_use_only_public_modules_of_the_core(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    inside = {
        name.removeprefix("blt_core.") for name in used if (name or "").startswith("blt_core.")
    }
    assert {
        name for name in inside if not f"{name}.".startswith(tuple(f"{p}." for p in PUBLIC))
    } == set()
