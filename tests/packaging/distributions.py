"""Distributions as their users have them: wheels that are built, and unpacked away from sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import attrs

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


def wheel_of(folder: Path, source: Path) -> Path:
    """The wheel of a source folder, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob("*.whl"))
    subprocess.run([sys.executable, "-c", BUILD, folder, source], check=True, timeout=600)
    [wheel] = set(folder.glob("*.whl")) - before
    return wheel


@attrs.frozen
class Environment:
    """A Python with the libraries that blt-core needs, and of blt-core what is installed in it."""

    folder: Path

    @classmethod
    def new(cls, folder: Path) -> Environment:
        """An empty one. The libraries are links to those of this Python, blt-core's own aside."""
        venv.create(folder / "env", symlinks=True)
        libraries = folder / "libraries"
        libraries.mkdir()
        for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            for each in Path(place).iterdir():
                if "blt" not in each.name and each.suffix != ".pth":
                    (libraries / each.name).symlink_to(each)
        made = cls(folder / "env")
        (made.site / "libraries.pth").write_text(f"{libraries}\n")
        return made

    @property
    def site(self) -> Path:
        """Its site-packages."""
        [site] = self.folder.glob("lib/python*/site-packages")
        return site

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def install(self, *wheels: Path) -> None:
        """Install these wheels, by pip, and nothing else."""
        options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "-q")
        pip = (sys.executable, "-m", "pip", "--python", self.python)
        subprocess.run([*pip, "install", *options, *wheels], check=True, timeout=600)

    def run(self, cwd: Path, *arguments: object, **environment: str) -> str:
        """What a program of it prints. AssertionError, with all that it said, if it fails."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        kept |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
        done = subprocess.run(
            [str(each) for each in arguments], cwd=cwd, env=kept, check=False,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
        return done.stdout

    def blt(self, cwd: Path, *arguments: object, **environment: str) -> str:
        """What a command line prints."""
        return self.run(cwd, self.folder / "bin" / "blt", *arguments, **environment)


def run(site: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python in ``folder``, with what is installed in ``site`` before all else."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, check=False, capture_output=True,
        text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )  # fmt: skip
