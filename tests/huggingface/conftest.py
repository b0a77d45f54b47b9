"""Folders that transformers saved, once a session."""

from __future__ import annotations

import pytest

from blt_core.pipeline import Pipeline
from tests.huggingface import published


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """A function from a model's name to its folder."""
    home = tmp_path_factory.mktemp("published")
    return lambda name: published.saved(name, home / name.replace(" ", "-"))


@pytest.fixture(scope="session")
def pipeline_of(folder_of):
    """A function from a model's name to its pipeline, other settings of ``[run]`` beside."""

    def load(name, **run):
        return Pipeline.from_config(
            {"schema": 1, "run": {"checkpoint": str(folder_of(name)), **run}}
        )

    return load
