"""Processes that begin with DeepSpeed imported: each test would pay for that anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.forks import Forks


@pytest.fixture(scope="session")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which DeepSpeed compiles, if it does: it must stay empty."""
    return tmp_path_factory.mktemp("extensions")


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory, extensions: Path) -> Iterator[Forks]:
    """Processes on the CPU that begin with DeepSpeed imported, for all tests."""
    env = {
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "CUDA_VISIBLE_DEVICES": "",
    }
    made = Forks(tmp_path_factory.mktemp("forks"), "deepspeed", env=env)
    yield made
    made.close()
