"""What the plain run tries, and how much more with BLT_NIGHTLY=1: one switch for all tests.

Every promise has a test in the plain run, which fits into one CI job. A nightly run tries the same
on more examples, and the tests marked ``nightly`` besides.
"""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")

#: Whether this is a nightly run; set BLT_NIGHTLY=1 for one.
NIGHTLY = os.environ.get("BLT_NIGHTLY", "") not in {"", "0"}
#: Examples of a property that names no number of its own, by Hypothesis profile.
EXAMPLES = {"ci": 12, "nightly": 50, "thorough": 500}


def nightly_or(plain: T, nightly: T) -> T:
    """``nightly`` in a nightly run, else ``plain``."""
    return nightly if NIGHTLY else plain


#: How hard contracts of components are tried: a number of examples, or the name of a profile.
CONTRACT_PROFILE = nightly_or("6", "ci")
