"""Data files are found from a wheel, an editable install and a plain checkout alike."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest

from tests.packaging.distributions import ROOT, run, wheel_of

PROBE = """
import json
import blt_core
from blt_core.resources import resource
from blt_plugins.demo.format import DemoFormat, DemoFormatParams, demo_names
print(json.dumps({
    "package": blt_core.__file__,
    "registry": str(resource("registry.toml")),
    "configs": sorted(p.stem for p in resource("configs").glob("*.toml")),
    "demos": demo_names(),
}))
"""


def probe(tmp_path: Path, *paths: Path, code: str = PROBE) -> dict:
    """Run ``code`` away from the checkout, with ``paths`` before everything else."""
    done = run(code, cwd=tmp_path, paths=paths)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    shutil.unpack_archive(wheel_of(folder, ROOT), folder / "site", "zip")
    return folder / "site"


def expected() -> tuple[list[str], list[str]]:
    configs = sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))
    demos = sorted(p.parent.name for p in (ROOT / "plugins/blt_plugins/demo").glob("*/config.toml"))
    return configs, demos


@pytest.mark.slow
def test_wheel(unpacked_wheel, tmp_path):
    found = probe(tmp_path, unpacked_wheel)
    assert Path(found["package"]).is_relative_to(unpacked_wheel)
    assert Path(found["registry"]).is_relative_to(unpacked_wheel)
    assert (found["configs"], found["demos"]) == expected()


@pytest.mark.slow
def test_wheel_discovers_its_plugins_and_generates(unpacked_wheel, tmp_path):
    code = """
import json, blt_core
from blt_core import Pipeline
from blt_core.cli.inputs import find_config
result = Pipeline.load(find_config("demo")).generate("import os\\n", max_new_bytes=24)
print(json.dumps({"package": blt_core.__file__, "bytes": len(result.output)}))
"""
    found = probe(tmp_path, unpacked_wheel, code=code)
    assert Path(found["package"]).is_relative_to(unpacked_wheel)
    assert found["bytes"] > 0


def test_checkout_that_is_not_installed(tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("blt_core", "plugins", "configs"):
        shutil.copytree(ROOT / name, checkout / name)
    for name in ("registry.toml", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout / name)
    found = probe(tmp_path, checkout, checkout / "plugins")
    assert Path(found["registry"]) == checkout / "registry.toml"
    assert (found["configs"], found["demos"]) == expected()


def test_editable_install(tmp_path):
    source = json.loads(metadata.distribution("blt-core").read_text("direct_url.json") or "{}")
    assert source["dir_info"]["editable"], "the tests run in an editable install: scripts/test.sh"
    found = probe(tmp_path)
    assert Path(found["registry"]) == ROOT / "registry.toml"
    assert (found["configs"], found["demos"]) == expected()
