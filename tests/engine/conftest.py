"""Runs the coverage check last, and only where the whole folder runs."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
WHOLE = pytest.StashKey[bool]()
_COLLECTED = pytest.StashKey[set[str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note what was collected before -k and the like take some away; move the check to the end."""
    config.stash[_COLLECTED] = {item.nodeid for item in items if HERE in item.path.parents}
    items.sort(key=lambda item: item.path == HERE / "test_coverage.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Whether every test of this folder is going to run."""
    left = {item.nodeid for item in session.items if HERE in item.path.parents}
    files = {item.path for item in session.items}
    everything = all(path in files for path in HERE.glob("test_*.py"))
    whole_files = not any("::" in argument for argument in session.config.args)
    session.config.stash[WHOLE] = (
        everything and whole_files and left == session.config.stash.get(_COLLECTED, left)
    )


@pytest.fixture
def whole_folder_runs(request: pytest.FixtureRequest) -> bool:
    """Whether no test of this folder was left out of this run."""
    return request.config.stash[WHOLE]
