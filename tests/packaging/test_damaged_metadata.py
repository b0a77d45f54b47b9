"""Processes beside distributions whose metadata is damaged: they are named, and all works."""

from __future__ import annotations

import os

import attrs
import pytest

from tests.forks import BLT, forks

METADATA = "Metadata-Version: 2.1\nName: {}\nVersion: 1.0\n"

pytestmark = pytest.mark.slow


@attrs.frozen
class Done:
    """What a command line ended with, and wrote."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def blt(tmp_path):
    """Run a command line in a process that also finds such distributions."""
    for name, text in {
        "broken": "[other.group]\nacme\n",
        "acme": "[blt_core]\nempty =\nspaced = a b\nleaves = acme_leaves\nslow = acme_slow\n",
    }.items():
        info = tmp_path / "site" / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(METADATA.format(name))
        (info / "entry_points.txt").write_text(text)
    (tmp_path / "site" / "acme_leaves.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "site" / "acme_slow.py").write_text("from blt_core import hookimpl\n")

    def blt(*arguments: str) -> Done:
        done = forks().run(
            BLT, arguments, cwd=tmp_path, paths=[tmp_path / "site"],
            env={**os.environ, "COLUMNS": "400"},
        )  # fmt: skip
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    blt.site = tmp_path / "site"
    return blt


def test_commands_work_and_the_damaged_are_listed(blt):
    done = blt("generate", "--prompt", "x", "--max-new-bytes", "2")
    assert (done.returncode, len(done.stdout)) == (0, 2), done.stderr
    assert "Traceback" not in done.stderr
    shown = " ".join(blt("plugins", "sampler").stdout.split())
    wanted = "expected 'package.module' or 'package.module:object'"
    assert "distribution 'broken' is broken: entry_points.txt is" in shown
    assert f"plugin 'empty' (acme) is broken: its entry point is ''; {wanted}" in shown
    assert f"plugin 'spaced' (acme) is broken: its entry point is 'a b'; {wanted}" in shown
    assert "plugin 'leaves' (acme) is broken: SystemExit: 0" in shown
    assert "(blt-core) is broken" not in shown


def test_an_unknown_name_mentions_them(blt):
    done = blt("check", "--sampler", "acme/tree")
    assert done.returncode == 2
    assert "no sampler named 'acme/tree'" in done.stderr
    assert "distribution 'broken' is broken" in done.stderr


def test_ctrl_c_while_a_plugin_is_imported_names_it(blt):
    (blt.site / "acme_slow.py").write_text(
        "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = blt("check")
    assert done.returncode == 1
    assert done.stderr == "interrupted while plugin 'slow' (acme) was imported\n"
