"""The pytest plugin of blt-core: conformance tests of components, their profiles and a header.

pytest imports this module in every run of everyone who has blt-core, so it imports neither torch
nor hypothesis nor blt_core until a test asks for a contract.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from blt_core.testing import Result, Trial

_PROFILES = "dev, ci, nightly or a number of examples"


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--blt-profile``: how hard contracts are tried that no test says it of."""
    group = parser.getgroup("blt", "conformance of components of blt-core")
    group.addoption(
        "--blt-profile",
        metavar="PROFILE",
        default=None,
        help=f"{_PROFILES}: how hard contracts are tried (default: dev, or blt_profile of the "
        "ini file)",
    )
    parser.addini("blt_profile", f"the profile of conformance tests: {_PROFILES}", default="dev")


def pytest_configure(config: pytest.Config) -> None:
    """The marker of conformance tests."""
    config.addinivalue_line(
        "markers", "blt_conformance(kind, name): a contract of a component of blt-core"
    )


@pytest.fixture
def contract(request: pytest.FixtureRequest) -> Callable[[], Result]:
    """Tries a contract: call it. For functions that ``blt_core.testing.conformance`` marks."""
    trial: Trial | None = getattr(request, "param", None)
    if trial is None:
        pytest.fail("mark the test with @blt_core.testing.conformance(kind, name)")
    from blt_core.testing.kit import profile_of

    name: Any = request.config.getoption("--blt-profile") or request.config.getini("blt_profile")

    def run() -> Result:
        return trial.run(profile_of(name))

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Which distributions with plugins were there, where a contract was tried."""
    if "blt_core.testing.kit" not in sys.modules:
        return
    from importlib import metadata

    points = metadata.entry_points(group="blt_core")
    found = {p.dist.name: p.dist.version for p in points if p.dist is not None}
    told = ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
    name = config.getoption("--blt-profile") or config.getini("blt_profile")
    terminalreporter.write_line(f"blt conformance: profile {name}; plugins of {told}")
