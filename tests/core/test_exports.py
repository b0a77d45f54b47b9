"""The names at the top of the package: lazy, complete, and the objects of their modules."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import blt_core
from blt_core.plugins import registry_file

MODULE_OF = {name: module for module, names in blt_core._MODULES.items() for name in names}


def test_the_lazy_table_and_the_list_of_names_agree():
    assert sorted(MODULE_OF) == blt_core.__all__ == sorted(set(blt_core.__all__))
    assert sum(map(len, blt_core._MODULES.values())) == len(MODULE_OF)


def test_what_a_type_checker_sees_is_what_is_given():
    source = ast.parse(Path(blt_core.__file__).read_text("utf-8"))
    imports = [node for node in ast.walk(source) if isinstance(node, ast.ImportFrom)]
    seen = {
        each.name: node.module.removeprefix("blt_core.")
        for node in imports
        if node.module.startswith("blt_core.")
        for each in node.names
    }
    assert seen == MODULE_OF


@pytest.mark.parametrize("name", blt_core.__all__)
def test_every_name_is_the_one_of_its_module(name):
    module = importlib.import_module(f"blt_core.{MODULE_OF[name]}")
    assert getattr(blt_core, name) is getattr(module, name)
    assert name in dir(blt_core)


def test_the_protocol_of_every_kind_of_the_core_is_there():
    protocols = {kind.protocol for kind in registry_file.load_manifest().kinds.values()}
    names = {p.rpartition(":")[2] for p in protocols if p.startswith("blt_core.protocols:")}
    assert len(names) >= 10
    assert names <= set(blt_core.__all__)


def test_values_and_validators_of_plugins_need_no_torch():
    names = [name for name in MODULE_OF if MODULE_OF[name] in ("types", "component", "config")]
    code = f"import sys, blt_core\nfor name in {names}: getattr(blt_core, name)\n"
    code += "blt_core.Draft([[1]]), blt_core.load_plugins, blt_core.hookimpl\n"
    code += "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
