"""The hooks that a plugin module may implement, each marked with ``@hookimpl``.

Hooks are called at assembly, at the boundaries of a run, and after each of its steps; never within
one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from blt_core.component import Component, Kind, Preset
    from blt_core.decoding.engine import Step
    from blt_core.pipeline import Generation, Run
    from blt_core.plugins.loading import Plugins
    from blt_core.wiring.config import Config

PROJECT = "blt_core"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def blt_kinds() -> Mapping[str, Kind]:  # type: ignore[empty-body]
    """Kinds of components that this plugin declares, by name.

    Any plugin may supply and nest components of them, whichever is loaded first.
    """


@hookspec
def blt_components() -> Iterable[Component | Preset]:  # type: ignore[empty-body]
    """The components and presets that this plugin supplies."""


@hookspec
def blt_settings() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Config tables that this plugin's commands read, each with the attrs class of its keys."""


@hookspec
def blt_check(config: Config, plugins: Plugins) -> Mapping[str, object] | None:
    """The tables, with every key, of a config that this plugin's commands run (for ``blt check``).

    None for any other config. Raises ConfigError with all problems; nothing is built.
    """


@hookspec
def blt_run_start(run: Run | Any) -> None:
    """A run begins. ``run`` is the same object in all calls of one run.

    It is a :class:`blt_core.pipeline.Run` where text is generated; a command of a plugin tells of
    its own runs with values of its own. What a run hook raises is logged and does not end the run.
    """


@hookspec
def blt_run_step(run: Run | Any, step: Step | Any) -> None:
    """One step of a run is over: a sampler round, or an optimizer step."""


@hookspec
def blt_run_end(run: Run | Any, result: list[Generation] | Any | None) -> None:
    """A run is over; ``result`` is what its caller gets, or None if it failed."""
