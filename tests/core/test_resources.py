from __future__ import annotations

import pytest

from blt_core.errors import DataError
from blt_core.resources import resource


def test_this_checkout_has_its_registry_and_configs() -> None:
    assert resource("registry.toml").is_file()
    assert resource("configs").is_dir()


def test_a_wheel_carries_its_data_inside_the_package(tmp_path) -> None:
    package = tmp_path / "blt_core"
    (package / "_data").mkdir(parents=True)
    (package / "_data" / "registry.toml").touch()
    assert resource("registry.toml", package=package) == package / "_data" / "registry.toml"


def test_a_checkout_is_told_by_its_pyproject(tmp_path) -> None:
    package = tmp_path / "blt_core"
    (tmp_path / "registry.toml").touch()
    with pytest.raises(DataError, match=r"registry\.toml: not found .* reinstall it"):
        resource("registry.toml", package=package)
    (tmp_path / "pyproject.toml").touch()
    assert resource("registry.toml", package=package) == tmp_path / "registry.toml"
