"""What is used of DeepSpeed beyond its documentation: in one file, and there in this version."""

from __future__ import annotations

import ast
import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import blt_plugins.deepspeed
from blt_core.errors import PluginError
from blt_plugins.deepspeed import internals
from blt_plugins.deepspeed.internals import INTERNALS, Internal, check_engine, check_package
from blt_plugins.deepspeed.versions import FIX

FOLDER = Path(__file__).parent
SOURCES = sorted(Path(blt_plugins.deepspeed.__path__[0]).glob("*.py"))
#: What the other files may use of the package and of an engine: DeepSpeed documents it.
DOCUMENTED = {
    "deepspeed": {"init_distributed", "initialize", "utils", "zero"},
    "engine": {"backward", "step", "save_checkpoint", "load_checkpoint", "optimizer"},
}
#: How the other files name them: variables, and calls of the backend's own.
NAMES = {
    "deepspeed": "deepspeed", "package": "deepspeed", "_package": "deepspeed",
    "_deepspeed": "deepspeed", "engine": "engine", "_engine": "engine", "_running": "engine",
}  # fmt: skip
IDS = [each.path for each in INTERNALS]


def owner_of(node: ast.expr) -> str:
    """``deepspeed`` or ``engine`` where an expression is one of them, or "" """
    inner = node.func if isinstance(node, ast.Call) else node
    name = inner.attr if isinstance(inner, ast.Attribute) else getattr(inner, "id", "")
    return NAMES.get(name, "")


def undocumented(source: str) -> list[str]:
    """What a file uses that belongs into internals.py."""
    secret = {each.path.rsplit(".", 1)[-1] for each in INTERNALS} - {"main", "destroy"}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
            dunder = node.attr.startswith("__") and node.attr.endswith("__")
            if node.attr.startswith("_") and not own and not dunder:
                found.append(node.attr)
            owner = owner_of(node.value)
            if owner and node.attr not in DOCUMENTED[owner]:
                found.append(f"{owner}.{node.attr}")
            if node.attr in secret:
                found.append(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [node.value] if node.value in secret else []
        elif isinstance(node, ast.ImportFrom):
            found += [f"from {node.module}"] if (node.module or "").startswith("deepspeed") else []
        elif isinstance(node, ast.Import):
            found += [f"import {x.name}" for x in node.names if x.name.startswith("deepspeed.")]
    return found


def test_only_one_file_uses_what_deepspeed_does_not_document():
    others = [path for path in SOURCES if path.name != "internals.py"]
    assert {"backend.py", "process.py", "weights.py", "resume.py"} <= {each.name for each in others}
    found = {path.name: undocumented(path.read_text()) for path in others}
    assert found == {path.name: [] for path in others}


@pytest.mark.parametrize(
    "line",
    [
        "engine._config", "self._engine().device", "self._running.destroy()", "part._parameters",
        "x.ds_numel", "getattr(x, 'ds_id')", "from deepspeed.checkpoint import ds_to_universal",
        "import deepspeed.ops", "package.comm",
    ],
)  # fmt: skip
def test_such_a_use_is_found(line):
    assert undocumented(line)


def test_all_internals_have_names_reasons_and_are_used():
    used = {
        node.value.id
        for node in ast.walk(ast.parse(Path(internals.__file__).read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    used |= {"PRE_FORWARD_HOOK", "POST_FORWARD_HOOK"}  # looped over
    names = {name for name, value in vars(internals).items() if isinstance(value, Internal)}
    assert names <= used
    assert len(set(IDS)) == len(INTERNALS) == len(names)
    for each in INTERNALS:
        assert each.owner in {"deepspeed", "engine", "parameter"}
        assert each.needed_for.startswith("to ")


def stand_in(internal: Internal, *leaf: Any) -> Any:
    """Something that has all of the path but the last part, which is ``leaf`` if that is given."""
    *inner, last = internal.path.split(".")[1:]
    value: Any = SimpleNamespace(**({last: leaf[0]} if leaf else {}))
    for name in reversed(inner):
        value = SimpleNamespace(**{name: value})
    return value


@pytest.mark.parametrize("internal", INTERNALS, ids=IDS)
def test_one_that_is_missing_or_other_is_named_with_its_purpose_and_the_version(internal):
    for owner, what in (
        (stand_in(internal), "is missing"),
        (stand_in(internal, "odd"), "is 'odd'"),
    ):
        with pytest.raises(PluginError) as caught:
            internal.of(owner)
        message = str(caught.value)
        assert f"DeepSpeed {metadata.version('deepspeed')}" in message
        assert f"{internal.path} {what}" in message
        assert f"it is needed {internal.needed_for}" in message
        assert FIX in message


def test_a_start_names_all_that_is_missing_at_its_stage():
    with pytest.raises(PluginError) as caught:
        check_engine(SimpleNamespace(), nn.Linear(2, 2), 3)
    message = str(caught.value)
    for each in INTERNALS:
        assert message.count(f"{each.path} is missing") == (each.owner != "deepspeed")
    with pytest.raises(PluginError) as caught:
        check_engine(SimpleNamespace(), nn.Linear(2, 2), 0)
    assert "engine.destroy" in str(caught.value)
    assert "parameter_offload" not in str(caught.value)


def test_what_only_the_cpu_needs_is_not_asked_for_elsewhere():
    for device, asked in (("cpu", True), ("cuda", False)):
        with pytest.raises(PluginError) as caught:
            check_package(SimpleNamespace(), torch.device(device))
        assert ("__compatible_ops__" in str(caught.value)) == asked
        assert "deepspeed.comm.comm.cdb is missing" in str(caught.value)


def test_a_converter_with_another_option_is_told(monkeypatch):
    monkeypatch.setattr(internals.inspect, "getsource", lambda _: "args.input_folder, args.novel")
    problem = internals.CONVERTER.problem(stand_in(internals.CONVERTER, lambda args: None))
    assert "not a function of one object with the options num_extract_workers" in problem


def neighbour(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def installed(tmp_path_factory, forks) -> dict[tuple[str, int], str]:
    """What is wrong in the installed version, with an engine of each stage."""
    folder = tmp_path_factory.mktemp("internals")
    result = folder / "internals.pt"
    neighbour("launch").run_program(forks, "internals", result, folder, 1)
    return torch.load(result)


@pytest.mark.slow
@pytest.mark.parametrize("internal", INTERNALS, ids=IDS)
def test_each_is_as_expected_in_the_installed_version(installed, internal):
    found = {stage: installed[internal.path, stage] for stage in internal.stages}
    if problems := {problem for problem in found.values() if problem}:
        version = metadata.version("deepspeed")
        pytest.fail(f"DeepSpeed {version}: {'; '.join(sorted(problems))}", pytrace=False)
