"""Hooks of the executors: the kind, and those that come with it."""

from __future__ import annotations

from blt_core.component import Component, Kind
from blt_core.hookspecs import hookimpl
from blt_plugins.executors.local import LOCAL
from blt_plugins.executors.ray import RAY


@hookimpl
def blt_kinds() -> dict[str, Kind]:
    """The kind ``executor``."""
    return {
        "executor": Kind(
            protocol="blt_core.execution:Executor",
            summary="where work is done that falls into many tasks",
            root=True,
            contracts="blt_core.testing.kinds.executors:EXECUTOR",
            template="blt_core.templates.executor",
        )
    }


@hookimpl
def blt_components() -> list[Component]:
    """The executors."""
    return [LOCAL, RAY]
