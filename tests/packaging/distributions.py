"""Distributions as their users have them: wheels that are built, and unpacked away from sources."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable, Mapping
from pathlib import Path

import attrs

from tests.forks import Forks, forks
from tests.nightly import nightly_or

ROOT = Path(__file__).resolve().parents[2]
#: How hard the kit tries components of other distributions, as options of pytest. Laws are counted
#: in thousands of texts: the plain run does so for this package's own, in tests/conformance.
KIT = nightly_or(("--blt-profile", "2", "-k", "not law"), ("--blt-profile", "ci"))
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


@attrs.frozen(slots=False)
class Environment:
    """A Python with the libraries that blt-core needs, and of blt-core what is installed in it."""

    folder: Path

    @classmethod
    def new(cls, folder: Path) -> Environment:
        """An empty one. The libraries are links to those of this Python, blt-core's own aside."""
        venv.create(folder / "env", symlinks=True)
        # Hypothesis reads the source of all that is in no folder of this name, to learn from it.
        libraries = folder / "libraries" / "site-packages"
        libraries.mkdir(parents=True)
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

    @functools.cached_property
    def _forks(self) -> Forks:
        """Forks of its interpreter, which has imported torch and nothing of what is installed."""
        return Forks("import torch", self.python, _variables(), self.folder)

    def python_prints(self, cwd: Path, code: str) -> str:
        """What a program of a new process prints."""
        done = subprocess.run(
            [self.python, "-c", code], cwd=cwd, env=_variables(), check=True,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        return done.stdout

    def pytest(self, cwd: Path, *arguments: object) -> str:
        """What its pytest prints. AssertionError, with all that it said, if it fails."""
        return self._run(cwd, "import pytest; raise SystemExit(pytest.main())", "-c", arguments, {})

    def blt(self, cwd: Path, *arguments: object, **environment: str) -> str:
        """What a command line prints. AssertionError, with all that it said, if it fails."""
        program = self.folder / "bin" / "blt"
        return self._run(cwd, program.read_text(), program, arguments, environment)

    def _run(
        self,
        cwd: Path,
        code: str,
        name: str | Path,
        arguments: Iterable[object],
        environment: Mapping[str, str],
    ) -> str:
        env = _variables() | environment
        done = self._forks.run(code, arguments, cwd=cwd, env=env, name=str(name))
        said = done.stdout.decode()
        assert done.returncode == 0, said[-6000:] + done.stderr.decode()[-6000:]
        return said

    def close(self) -> None:
        """End the process that is forked, if there is one."""
        if "_forks" in self.__dict__:
            self._forks.close()


def _variables() -> dict[str, str]:
    """Of the environment variables those that an installation may know."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "BLT_KERNELS": "fixed"}


def run(
    code: str, *arguments: object, cwd: Path, paths: Iterable[Path] = ()
) -> subprocess.CompletedProcess[bytes]:
    """Run a program that finds ``paths`` before all else; torch alone has been imported there."""
    env = {**os.environ, "COLUMNS": "200"}
    return forks("import torch").run(code, arguments, cwd=cwd, paths=paths, env=env)
