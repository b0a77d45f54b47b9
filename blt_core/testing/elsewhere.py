"""The same component in a process of its own, in which Python hashes texts otherwise.

``hash("fr")`` is another number in each process, and so is the order of a set of texts: a component
that lets either decide looks repeatable until it is run again.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from blt_core.testing.contracts import Broken

if TYPE_CHECKING:
    from blt_core.testing.subject import Subject

#: Seconds until the other process counts as stuck.
PATIENCE = 300.0
_SERVE = "from blt_core.testing.elsewhere import serve; serve()"


def require_same(subject: Subject, told: str) -> None:
    """Broken unless another process tells the same of the component, if it can be found there.

    told: ``package.module:name`` of a function that tells what matters of a subject, as texts by
    what they are of.
    """
    given = [(d, n, plugin) for d, n, plugin in subject.plugins.given]
    modules = [plugin.__name__ for _, _, plugin in given if isinstance(plugin, ModuleType)]
    if len(modules) < len(given) or not all(name in sys.modules for name in modules):
        return  # no other process can import them
    with tempfile.TemporaryDirectory(prefix="blt-") as folder:
        order = Path(folder) / "order.json"
        order.write_text(
            json.dumps(
                {
                    "kind": subject.kind,
                    "name": subject.name,
                    "table": dict(subject.table),
                    "seed": subject.seed,
                    "given": [(d, n, m) for (d, n, _), m in zip(given, modules, strict=True)],
                    "told": told,
                    "folder": os.getcwd(),  # noqa: PTH109
                    "environment": dict(os.environ),
                    "path": [entry or os.getcwd() for entry in sys.path],  # noqa: PTH109
                }
            )
        )
        answer = order.with_suffix(".told")
        failed = _other_python(os.getpid()).answer(order)
        if failed or not answer.is_file():
            last = (failed or "it ended without an answer").splitlines()[-1]
            raise Broken(f"it fails in a process of its own: {last}")
        there: dict[str, str] = json.loads(answer.read_text())
    here = _told(told, subject)
    subject.exercised()
    for what in here | there:
        if here.get(what) != there.get(what):
            raise Broken(
                f"{what} is another one in another process, in which hash() of texts and the order "
                "of sets are others",
            )


def _told(told: str, subject: Subject) -> dict[str, str]:
    module, _, name = told.partition(":")
    found: dict[str, str] = getattr(importlib.import_module(module), name)(subject)
    return found


class _OtherPython:
    """A Python that hashes texts otherwise, and forks for each question: it imports torch once."""

    def __init__(self) -> None:
        seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # noqa: PTH109
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with it
        self._process = subprocess.Popen(  # noqa: S603 -- Python itself, and what it is to import
            [sys.executable, "-c", _SERVE],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            bufsize=0,
            start_new_session=True,
        )
        self._owner = os.getpid()
        atexit.register(self.close)

    def answer(self, order: Path) -> str:
        """What it failed with, or nothing: ``tell`` has answered then.

        Raises subprocess.TimeoutExpired when it takes longer than PATIENCE.
        """
        try:
            failed = self._answer(order)
        except BaseException:  # its answer to this question must not be read as one to the next
            self.close()
            raise
        if failed is None:
            self._said.seek(0)
            failed = self._said.read().decode(errors="replace").strip() or "the process has ended"
            self.close()
        return failed.strip()

    def _answer(self, order: Path) -> str | None:
        """As ``answer``; None if the process has ended."""
        questions, ends = self._process.stdin, self._process.stdout
        if questions is None or ends is None:
            raise ValueError("it has no pipes")
        try:
            questions.write(f"{json.dumps(str(order))}\n".encode())
        except BrokenPipeError:
            return None
        if not select.select([ends], [], [], PATIENCE)[0]:
            raise subprocess.TimeoutExpired(_SERVE, PATIENCE)
        line = ends.readline()
        failed: str | None = json.loads(line) if line else None
        return failed

    def close(self) -> None:
        """End it and its forks. A fork of the process that has started it leaves it alone."""
        _other_python.cache_clear()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            if pipe is not None:
                pipe.close()
        if os.getpid() == self._owner and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@functools.cache
def _other_python(_process: int) -> _OtherPython:
    """That of a process, by its number: a fork has its own."""
    return _OtherPython()


def serve() -> None:
    """What the other Python does: ``tell`` for each file that stdin names, and how it failed."""
    # What components print is no answer, and what they read no question.
    questions, ends = os.fdopen(os.dup(0)), os.dup(1)
    os.dup2(2, 1)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    importlib.import_module("blt_core.testing.kit")
    for line in questions:
        order = Path(json.loads(line))
        child = os.fork()
        if child == 0:
            _tell_and_end(order)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        failed = _failed(order)
        said = failed.read_text(errors="replace") if failed.is_file() else ""
        if ended < 0:
            said = f"ended by signal {-ended}"
        os.write(ends, f"{json.dumps(said)}\n".encode())


def _failed(order: Path) -> Path:
    """Where is written how the answer to ``order`` failed."""
    return order.with_suffix(".failed")


def _tell_and_end(order: Path) -> None:
    """``tell``, and the end of this process."""
    signal.alarm(int(PATIENCE))  # whatever becomes of those who wait for it
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        tell(str(order))
    except BaseException:  # noqa: BLE001 -- it is said, whatever it is
        _failed(order).write_text(traceback.format_exc())
    finally:
        os._exit(0)


def tell(path: str) -> None:
    """What a fork of it does: answer what the file ``path`` asks, in a file beside it."""
    from blt_core.plugins.loading import load_plugins
    from blt_core.testing.kit import subject_of

    order = json.loads(Path(path).read_text())
    os.chdir(order["folder"])
    seed = {"PYTHONHASHSEED": os.environ["PYTHONHASHSEED"]}  # what is started there has it too
    os.environ.clear()
    os.environ.update(order["environment"] | seed)
    sys.path[:] = order["path"]
    importlib.invalidate_caches()
    given = [(d, n, importlib.import_module(module)) for d, n, module in order["given"]]
    plugins = load_plugins(extra=given)
    subject = subject_of(order["kind"], order["name"], order["table"], plugins, order["seed"])
    answer = Path(path).with_suffix(".told")
    answer.write_text(json.dumps(_told(order["told"], subject)))
