"""The component ``lm-eval``: any task of lm-evaluation-harness (the extra ``lm-eval``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import attrs

from blt_core.component import BuildContext, Component, at_least, not_empty
from blt_core.errors import DataError
from blt_core.evaluation.protocol import Asked, Part
from blt_core.files import expand_home


@attrs.frozen(kw_only=True)
class LmEvalParams:
    """A task of the harness; ``lm-eval:NAME`` stands for ``lm-eval task=NAME``.

    task: a task, group or tag. include: a folder with YAML of your own tasks. shots: examples
    before each item (default: the task's). bytes_per_token: bytes for each token of a task's limit
    of new tokens.
    """

    task: str = attrs.field(validator=not_empty())
    include: str | None = attrs.field(
        default=None, converter=attrs.converters.optional(expand_home), validator=not_empty()
    )
    shots: int | None = attrs.field(default=None, validator=at_least(0))
    bytes_per_token: int = attrs.field(default=4, validator=at_least(1))


class LmEval:
    """Raises DataError, when it is made, if lm-eval or the task's data is not there."""

    def __init__(self, params: LmEvalParams, context: BuildContext) -> None:
        try:
            from blt_plugins.tasks.harness import HarnessTasks
        except ImportError as error:
            raise DataError(
                f"the tasks of lm-eval need a package that is not installed ({error})\n"
                "  fix: pip install 'blt-core[lm-eval]'"
            ) from error
        self._tasks = HarnessTasks(
            params.task, params.include, params.shots, params.bytes_per_token
        )
        self.asks: Literal["text", "likelihood"] = "text" if self._tasks.generates else "likelihood"

    def run(self, model: Asked, limit: int | None) -> Sequence[Part]:
        """The parts of the task, one for each task and group below it."""
        return self._tasks.run(model, limit)


LM_EVAL = Component(
    kind="task",
    name="lm-eval",
    factory=LmEval,
    params=LmEvalParams,
    summary="a task of lm-evaluation-harness: lm-eval:NAME",
)
