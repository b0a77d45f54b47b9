"""Distributions as their users have them: wheels that are built, and unpacked away from sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = """
import os, sys
from hatchling.build import build_wheel
wheels, *sources = sys.argv[1:]
for source in sources:
    os.chdir(source)
    build_wheel(wheels)
"""


def install(site: Path, *sources: Path) -> None:
    """Build the wheel of each source folder, and unpack all into ``site``, metadata included."""
    wheels = site.with_name(f"{site.name}-wheels")
    wheels.mkdir(parents=True)
    subprocess.run([sys.executable, "-c", BUILD, wheels, *sources], check=True, timeout=600)
    built = sorted(wheels.glob("*.whl"))
    assert len(built) == len(sources)
    for wheel in built:
        shutil.unpack_archive(wheel, site, "zip")


def run(site: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python in ``folder``, with what is installed in ``site`` before all else."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, check=False, capture_output=True,
        text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )  # fmt: skip
