from __future__ import annotations

import attrs
import pytest
import structlog

from blt_core.cli.app import run
from tests.tiny import write_checkpoint


@attrs.frozen
class Outcome:
    code: int
    out: bytes
    err: str


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def blt(capsysbinary):
    """Run a command line in this process: ``blt("generate", "--prompt", "x")``."""

    def call(*arguments: object) -> Outcome:
        code = run([str(argument) for argument in arguments])
        captured = capsysbinary.readouterr()
        return Outcome(code, captured.out, captured.err.decode())

    yield call
    structlog.reset_defaults()  # the command line logs to a stderr that is gone now


@pytest.fixture
def run_config(tmp_path, checkpoint):
    """Write a run config of the tiny checkpoint with these extra lines; gives its path."""

    def write(extra: str = "", run: str = ""):
        path = tmp_path / "run.toml"
        path.write_text(f'schema = 1\n[run]\ncheckpoint = "{checkpoint}"\n{run}\n{extra}\n')
        return path

    return write
