"""The hooks that a plugin module may implement, each marked with ``@hookimpl``.

Hooks are called at assembly, at the boundaries of a run, and after each of its steps; never within
one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import pluggy

from blt_core.component import Component, Preset

if TYPE_CHECKING:
    import typer

PROJECT = "blt_core"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def blt_components() -> Iterable[Component | Preset]:  # type: ignore[empty-body]
    """The components and presets that this plugin supplies."""


@hookspec
def blt_settings() -> Mapping[str, type]:  # type: ignore[empty-body]
    """Config tables that this plugin's commands read, each with the attrs class of its keys."""


@hookspec
def blt_commands(app: typer.Typer) -> None:
    """Add commands to the command line: ``@app.command() def …``.

    ``app`` is empty; its commands and groups join those of the others if all their names are new.
    """


@hookspec
def blt_check(config: object, plugins: object) -> Mapping[str, object] | None:
    """The tables, with every key, of a config that this plugin's commands run (for ``blt check``).

    ``config``: a ``blt_core.config.Config``; ``plugins``: the loaded ``blt_core.plugins.Plugins``.
    None for any other config. Raises ConfigError with all problems; nothing is built.
    """


@hookspec
def blt_run_start(run: object) -> None:
    """A run begins. ``run`` is the same object in all calls of one run.

    What a run hook raises is logged and does not end the run.
    """


@hookspec
def blt_run_step(run: object, step: object) -> None:
    """One step of a run is over: a sampler round, or an optimizer step."""


@hookspec
def blt_run_end(run: object, result: object) -> None:
    """A run is over; ``result`` is what its caller gets, or None if it failed."""
