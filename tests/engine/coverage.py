"""A run of the whole folder fails unless its properties met every demanded situation.

The tests may run in several processes (pytest-xdist): each reports what it met, and the process
that started them judges.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.engine.seen import DEMANDED, SEEN

HERE = Path(__file__).parent
_COLLECTED = pytest.StashKey[set[str]]()
_WHOLE = pytest.StashKey[bool]()
_REPORTS = pytest.StashKey[list[tuple[bool, Counter[str]]]]()
_MISSING = pytest.StashKey[list[str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note what was collected before -k and the like take some away."""
    config.stash[_COLLECTED] = {item.nodeid for item in items if HERE in item.path.parents}


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Whether every test of this folder is going to run."""
    left = {item.nodeid for item in session.items if HERE in item.path.parents}
    files = {item.path for item in session.items}
    everything = all(path in files for path in HERE.glob("test_*.py"))
    whole_files = not any("::" in argument for argument in session.config.args)
    session.config.stash[_WHOLE] = (
        everything and whole_files and left == session.config.stash.get(_COLLECTED, left)
    )


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the report of a process that has ended."""
    report = getattr(node, "workeroutput", {}).get("situations", (False, {}))
    node.config.stash.setdefault(_REPORTS, []).append((report[0], Counter(report[1])))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Report or, in the process that started the tests, fail if a situation is missing."""
    config = session.config
    own = (config.stash.get(_WHOLE, False), SEEN)
    if hasattr(config, "workeroutput"):
        config.workeroutput["situations"] = (own[0], dict(own[1]))
        return
    reports = config.stash.get(_REPORTS, [own])
    if exitstatus or config.option.collectonly or not all(whole for whole, _ in reports):
        return  # something failed, or not everything ran
    seen = sum((counts for _, counts in reports), Counter[str]())
    config.stash[_MISSING] = [situation for situation in DEMANDED if not seen[situation]]
    if config.stash[_MISSING]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name what no test met."""
    missing = config.stash.get(_MISSING, [])
    if missing:
        terminalreporter.section("situations that no test of the engine met", red=True)
        terminalreporter.line(", ".join(missing))
