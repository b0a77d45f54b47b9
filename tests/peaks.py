"""The peak memory of real processes, to hold plans against."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

PROGRAM = Path(__file__).parent / "training" / "peak_memory.py"


def measured_peak(
    tables: Mapping[str, Any], phase: str, folder: Path, *, processes: int = 1, threads: int = 1
) -> int:
    """Bytes that process 0 of ``processes`` takes at most, for a phase of a training config."""
    path = folder / "measured.toml"
    path.write_text(tomli_w.dumps(tables))
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={processes}"]
    # Freed memory goes back at once, so that the peak is that of what lives.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    done = subprocess.run(
        [*launcher, str(PROGRAM), str(path), phase],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: int = json.loads(done.stdout[done.stdout.index('{"peak"') :])["peak"]
    return found
