from __future__ import annotations

import pytest

from blt_core.pipeline import Pipeline
from tests.tiny import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", seed=4)


@pytest.fixture(scope="session")
def pipeline(checkpoint):
    return Pipeline.from_config({"schema": 1, "run": {"checkpoint": str(checkpoint)}})
