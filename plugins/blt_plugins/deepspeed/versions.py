"""Which versions of DeepSpeed are tested, and what is said of the others."""

from __future__ import annotations

import functools
import importlib.util
import os
from importlib import metadata

from blt_core.errors import PluginError
from blt_core.log import logger

#: The oldest version that the tests pass with. Of those before, 0.18.9 ends two processes in an
#: error, and 0.18.0 trains wrongly without one: at stage 2 it keeps the gradient of a step's last
#: pass alone.
OLDEST = "0.19.0"
#: From the oldest to the newest version that the tests pass with; pyproject.toml requires the same.
TESTED = f">={OLDEST},<0.19.9"
FIX = f"fix: pip install 'blt-core[deepspeed]', which installs a tested version ({TESTED})"


def installed() -> str:
    """The version that is installed."""
    return metadata.version("deepspeed")


def check_installed() -> None:
    """Raise PluginError unless DeepSpeed is installed, and is no older than what is tested."""
    if importlib.util.find_spec("deepspeed") is None:
        found = "it is not installed"
    elif _is_in(f"<{OLDEST}"):
        found = f"{installed()} is installed"
    else:
        return
    raise PluginError(
        f"the training backend 'deepspeed' needs DeepSpeed {OLDEST} or newer; {found}", [FIX]
    )


@functools.cache
def warn_untested() -> None:
    """Log, once in process 0, that the installed version is not one of those that are tested."""
    if int(os.environ.get("RANK", "0")) or _is_in(TESTED):
        return
    logger().warning(
        "this version of DeepSpeed has not been tested with the training backend 'deepspeed'",
        installed=installed(),
        tested=TESTED,
    )


def _is_in(versions: str) -> bool:
    from packaging.specifiers import SpecifierSet  # which DeepSpeed requires

    return SpecifierSet(versions).contains(installed(), prereleases=True)
