"""Hooks of the tasks: the kind, and those that come with it."""

from __future__ import annotations

from blt_core.component import Component, Kind
from blt_core.hookspecs import hookimpl
from blt_plugins.tasks.held_out import HELD_OUT
from blt_plugins.tasks.lm_eval import LM_EVAL
from blt_plugins.tasks.programs import HUMANEVAL, MBPP
from blt_plugins.tasks.translation import TRANSLATION


@hookimpl
def blt_kinds() -> dict[str, Kind]:
    """The kind ``task``."""
    return {
        "task": Kind(
            protocol="blt_core.evaluation.protocol:Task",
            summary="questions, and a way to score the answers",
            contracts="blt_core.testing.kinds.tasks:TASK",
            template="blt_core.templates.task",
        )
    }


@hookimpl
def blt_components() -> list[Component]:
    """The tasks."""
    return [HELD_OUT, TRANSLATION, HUMANEVAL, MBPP, LM_EVAL]
