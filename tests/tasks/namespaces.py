"""Whether programs can be run in namespaces of their own here."""

from __future__ import annotations

import pytest

from blt_core.evaluation.sandbox import why_not

needs_namespaces = pytest.mark.skipif(bool(why_not()), reason=f"no namespaces here: {why_not()}")
