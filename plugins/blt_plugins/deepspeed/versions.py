"""Which versions of DeepSpeed are tested, and what is said of the others."""

from __future__ import annotations

import functools
import importlib.util
import os
from importlib import metadata

from blt_core.errors import PluginError
from blt_core.log import logger

#: Versions that the tests pass with, from the oldest to the newest; pyproject.toml requires the
#: same.
TESTED = ">=0.18,<0.19.9"
FIX = f"fix: pip install 'blt-core[deepspeed]', which installs a tested version ({TESTED})"


def installed() -> str:
    """The version that is installed."""
    return metadata.version("deepspeed")


def check_installed() -> None:
    """Raise PluginError unless DeepSpeed is installed, in whichever version."""
    if importlib.util.find_spec("deepspeed") is None:
        raise PluginError(
            "the training backend 'deepspeed' needs DeepSpeed, which is not installed", [FIX]
        )


@functools.cache
def warn_untested() -> None:
    """Log, once in process 0, that the installed version is not one of those that are tested."""
    from packaging.specifiers import SpecifierSet  # which DeepSpeed requires

    version = installed()
    if int(os.environ.get("RANK", "0")) or SpecifierSet(TESTED).contains(version, prereleases=True):
        return
    logger().warning(
        "this version of DeepSpeed has not been tested with the training backend 'deepspeed'",
        installed=version,
        tested=TESTED,
    )
