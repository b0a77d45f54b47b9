"""What all tests share: Hypothesis profiles, nightly tests, and what the engine's tests met.

"ci" (the default) and "nightly" (with BLT_NIGHTLY=1) repeat the same examples on each run;
"thorough" draws new ones, ten times as many as "nightly": ``pytest --hypothesis-profile thorough``.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.nightly import CONTRACT_PROFILE, EXAMPLES, NIGHTLY

# Nothing is fetched while tests run; these libraries read it once, when they are imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

# Options of this run are not those of the runs of pytest that tests start, and read the output of.
os.environ.pop("PYTEST_ADDOPTS", None)

pytest_plugins = ["tests.engine.coverage"]

for _name, _examples in EXAMPLES.items():
    settings.register_profile(
        _name,
        max_examples=_examples,
        derandomize=_name != "thorough",
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
settings.load_profile("nightly" if NIGHTLY else "ci")

# Kernels that are measured may differ from one run to the next; tests that want them say so.
os.environ["BLT_KERNELS"] = "fixed"

# The models under test are tiny: more threads only wait for each other.
torch.set_num_threads(1)

#: A distribution of its own, with tests of its own: packaging/test_external_plugin.py runs them.
collect_ignore = ["external_plugin"]


def pytest_configure(config: pytest.Config) -> None:
    """How hard this distribution's own components are tried, unless the command says."""
    config.option.blt_profile = config.option.blt_profile or CONTRACT_PROFILE


@pytest.hookimpl(optionalhook=True)  # of xdist, without which tests run as well
def pytest_xdist_auto_num_workers() -> int | None:
    """One process more than there are cores: many tests wait for processes that they start."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    able = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return len(able(0)) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``nightly``, with their reason, unless this is a nightly run."""
    for item in items:
        marker = item.get_closest_marker("nightly")
        if marker is not None and not NIGHTLY:
            item.add_marker(pytest.mark.skip(reason=f"BLT_NIGHTLY=1: {marker.kwargs['reason']}"))
