"""The same component in a process of its own, in which Python hashes texts otherwise.

``hash("fr")`` is another number in each process, and so is the order of a set of texts: a component
that lets either decide looks repeatable until it is run again.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from blt_core.testing.contracts import Broken

if TYPE_CHECKING:
    from blt_core.testing.subject import Subject

#: Seconds until the other process counts as stuck.
PATIENCE = 300.0
_CALL = "import sys; from blt_core.testing.elsewhere import tell; tell(sys.argv[1])"


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
                }
            )
        )
        seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # noqa: PTH109
        process = subprocess.run(  # noqa: S603 -- Python itself, and what it is to import
            [sys.executable, "-c", _CALL, str(order)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            check=False,
        )
        answer = order.with_suffix(".told")
        if process.returncode or not answer.is_file():
            last = (process.stderr.strip() or "no message").splitlines()[-1]
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


def tell(path: str) -> None:
    """What the other process does: answer what the file ``path`` asks, in a file beside it."""
    from blt_core.plugins.loading import load_plugins
    from blt_core.testing.kit import subject_of

    order = json.loads(Path(path).read_text())
    given = [(d, n, importlib.import_module(module)) for d, n, module in order["given"]]
    plugins = load_plugins(extra=given)
    subject = subject_of(order["kind"], order["name"], order["table"], plugins, order["seed"])
    answer = Path(path).with_suffix(".told")
    answer.write_text(json.dumps(_told(order["told"], subject)))
