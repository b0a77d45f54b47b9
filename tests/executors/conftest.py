"""A file of prompts, and what one process makes of it."""

from __future__ import annotations

import json

import pytest

from blt_core.batch_inference import generate_file
from blt_core.pipeline import Pipeline
from tests.tiny import write_checkpoint

RUN = {"max_new_bytes": 12, "temperature": 1.0, "seed": 5, "dtype": "float64"}


def records(path):
    """Records without wall-clock figures."""
    times = {"prefill_seconds", "seconds", "bytes_per_second"}
    lines = path.read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", seed=4)


@pytest.fixture
def generated(checkpoint, tmp_path):
    """Records that an executor makes, and those of this process.

    watch: as of generate_file. settings: of ``[run]``, beside RUN.
    """
    prompts = [{"prompt": f"item {n} " * (n % 7)} for n in range(24)]
    prompts.insert(5, {"prompt": 5})
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in prompts))

    def run(executor, watch=None, **settings):
        config = {"schema": 1, "run": {**RUN, "checkpoint": str(checkpoint), **settings}}
        found = []
        for name, table in (("here", {}), ("there", {"executor": executor})):
            pipeline = Pipeline.from_config({**config, **table})
            out = tmp_path / f"{name}.jsonl"
            outcome = generate_file(
                pipeline, path, out, batch=2, watch=watch if name == "there" else None
            )
            assert (outcome.items, outcome.failed) == (25, 1)
            found.append(records(out))
        return found

    return run
