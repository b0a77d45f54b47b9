"""What all tests share: Hypothesis profiles, and the check of what the engine's tests met.

"ci" (the default) repeats the same examples on each run; "thorough" draws ten times as many new
ones: ``pytest --hypothesis-profile thorough``.
"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.engine.coverage"]

CI_EXAMPLES = 50
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]

settings.register_profile(
    "ci",
    max_examples=CI_EXAMPLES,
    derandomize=True,
    deadline=None,
    suppress_health_check=_SLOW,
)
settings.register_profile(
    "thorough", max_examples=10 * CI_EXAMPLES, deadline=None, suppress_health_check=_SLOW
)
settings.load_profile("ci")

# The models under test are tiny: more threads only wait for each other.
torch.set_num_threads(1)

#: A distribution of its own, with tests of its own: packaging/test_external_plugin.py runs them.
collect_ignore = ["external_plugin"]
