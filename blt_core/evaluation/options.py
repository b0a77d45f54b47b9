"""How tasks are run."""

from __future__ import annotations

from pathlib import Path

import attrs

from blt_core.execution import Workers
from blt_core.types import Parameters


@attrs.frozen(kw_only=True)
class RunOptions:
    """How tasks are run.

    limit: items of each part at most. batch: texts that run together. timed: questions that are
    timed one by one besides (0: none). seed: of intervals, and of what tasks draw. parameters: the
    counts that price passes (default: the model's own). folder: where answers are kept, if they
    are. allow_code, unsafe: whether programs that the model writes may be run, and that without
    isolation. workers: who answers (default: this process).
    """

    limit: int | None = None
    batch: int = 16
    timed: int = 0
    seed: int = 0
    parameters: Parameters | None = None
    folder: Path | None = None
    allow_code: bool = False
    unsafe: bool = False
    workers: Workers | None = None
