"""Contracts that ask another Python about a component."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blt_core.plugins.loading import load_plugins
from blt_core.testing import elsewhere
from blt_core.testing.contracts import Broken
from blt_core.testing.elsewhere import require_same
from blt_core.testing.kit import subject_of

TOLD = "tests.conformance.test_elsewhere:{}"


def hashed(_subject):
    return {"a hash": str(hash("a text"))}


def repeated(_subject):
    return {"a text": "a text"}


def placed(_subject):
    return {"where it is": os.environ["PLACED"], "a file": Path("here.txt").read_text()}


def printed(_subject):
    sys.stdout.write("no answer\n")
    return {"a text": "a text"}


def ended(_subject):
    if str(os.getpid()) != os.environ["ASKER"]:
        os._exit(3)
    return {}


def failed(_subject):
    if str(os.getpid()) != os.environ["ASKER"]:
        raise ValueError("not here")
    return {}


def reading(_subject):
    return {"what is read": sys.stdin.read()}


def killed(_subject):
    if str(os.getpid()) != os.environ["ASKER"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


def server_killed(_subject):
    if str(os.getpid()) != os.environ["ASKER"]:
        os.killpg(0, signal.SIGKILL)
    return {}


def stuck(_subject):
    time.sleep(60)
    return {}


@pytest.fixture
def subject():
    return subject_of("cost_model", "bandwidth", {}, load_plugins())


def test_nothing_is_read_there(subject, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    require_same(subject, TOLD.format("reading"))


def test_an_answer_that_nobody_has_waited_for_is_not_the_next_one_s(subject, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(elsewhere.select, "select", interrupt)
        with pytest.raises(KeyboardInterrupt):
            require_same(subject, TOLD.format("repeated"))
    require_same(subject, TOLD.format("printed"))


def test_hashes_are_others_and_nothing_else(subject):
    for name in ("repeated", "printed", "repeated"):
        require_same(subject, TOLD.format(name))
    with pytest.raises(Broken, match=r"a hash is another one in another process"):
        require_same(subject, TOLD.format("hashed"))


def test_it_is_where_this_one_is(subject, tmp_path, monkeypatch):
    for each in ("one", "two"):
        folder = tmp_path / each
        folder.mkdir()
        (folder / "here.txt").write_text(each)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PLACED", each)
        require_same(subject, TOLD.format("placed"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ended", "it ended without an answer"),
        ("failed", "ValueError: not here"),
        ("killed", "ended by signal 9"),
        ("server_killed", "the process has ended"),
    ],
)
def test_what_ends_or_fails_there_is_broken_and_the_next_is_asked(subject, monkeypatch, name, said):
    monkeypatch.setenv("ASKER", str(os.getpid()))
    with pytest.raises(Broken, match=f"fails in a process of its own: {said}"):
        require_same(subject, TOLD.format(name))
    require_same(subject, TOLD.format("repeated"))


def test_what_is_stuck_there_is_ended_and_the_next_is_asked(subject, monkeypatch):
    require_same(subject, TOLD.format("repeated"))
    monkeypatch.setattr(elsewhere, "PATIENCE", 0.5)
    with pytest.raises(subprocess.TimeoutExpired):
        require_same(subject, TOLD.format("stuck"))
    monkeypatch.undo()
    require_same(subject, TOLD.format("repeated"))
