"""Checkpoints that ship with the package: ``demo:NAME`` is the folder NAME beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from blt_core.component import BuildContext, Component, nested
from blt_core.errors import CheckpointError, near_match
from blt_core.protocols import CheckpointFormat

SCHEME = "demo:"
_HOME = Path(__file__).parent


@attrs.frozen(kw_only=True)
class DemoFormatParams:
    """files: the format in which the demos are stored."""

    files: CheckpointFormat = nested("checkpoint_format", default="folder")


class DemoFormat:
    """Finds a demo by name and has the format of its files read it."""

    def __init__(self, params: DemoFormatParams, context: BuildContext) -> None:
        self.files = params.files

    def recognises(self, location: str) -> bool:
        """Whether ``location`` starts with ``demo:``."""
        return location.startswith(SCHEME)

    def read(self, location: str) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """Config and tensors of a demo. Raises CheckpointError for an unknown name."""
        name, known = location.removeprefix(SCHEME), demo_names()
        if name not in known:
            raise CheckpointError(
                f"{location}: no such demo.{near_match(name, known)}\n"
                f"  demos: {', '.join(SCHEME + other for other in known) or 'none'}"
            )
        return self.files.read(str(_HOME / name))

    def write(
        self, location: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """Demos are read only: raises CheckpointError."""
        raise CheckpointError(f"{location}: demos ship with the package; write to a folder instead")


def demo_names() -> list[str]:
    """Names of the demos in this installation."""
    return sorted(path.parent.name for path in _HOME.glob("*/config.toml"))


DEMO = Component(
    kind="checkpoint_format",
    name="demo",
    factory=DemoFormat,
    params=DemoFormatParams,
    summary="demo:NAME, a small model that ships with the package",
)
