"""The format ``folder``: tensors in ``model.safetensors``, what rebuilds it in ``config.toml``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import tomli_w
from safetensors.torch import save_file
from torch import Tensor

from blt_core.component import BuildContext, Component
from blt_core.errors import CheckpointError, ConfigError
from blt_core.storage.folders import CONFIG, MODEL_FILES, TENSORS, current_folder, replace_folder
from blt_core.storage.safetensors import StoredTensors
from blt_core.storage.tensors import unshared
from blt_core.tables.place import read_tables
from blt_core.wiring.config import without_none


@attrs.frozen(kw_only=True)
class FolderFormatParams:
    """Nothing to set: the tensors' dtype is the writer's choice."""


class FolderFormat:
    """Reads and writes checkpoint folders. A location is a path; ``scheme:…`` is another's."""

    def __init__(self, params: FolderFormatParams, context: BuildContext) -> None:
        """Keeps no state."""

    def recognises(self, location: str) -> bool:
        """Whether ``location`` is a folder with one of the files; ``read`` tells of the other."""
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", location):
            return False
        folder = current_folder(Path(location))
        # Tensors beside a config.json are those of another world.
        other = (folder / "config.json").exists()
        return (folder / CONFIG).exists() or ((folder / TENSORS).exists() and not other)

    def read(self, location: str) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """The config, and the tensors, each read from the disk when it is asked for.

        Raises CheckpointError if a file is missing, cut short or malformed.
        """
        folder = current_folder(Path(location))
        for name in (CONFIG, TENSORS):
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder / name}: missing; a checkpoint is a folder with {_BOTH}"
                )
        return _read_config(folder / CONFIG), StoredTensors(folder / TENSORS)

    def write(
        self, location: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """Write a new folder and put it in the place of the old one; None values are left out.

        Raises DataError if something else has that name, RunError if it cannot be written.
        """
        with replace_folder(location, MODEL_FILES) as folder:
            (folder / CONFIG).write_text(tomli_w.dumps(without_none(config)), encoding="utf-8")
            save_file(unshared(tensors), str(folder / TENSORS), metadata={"format": "pt"})


_BOTH = " and ".join(MODEL_FILES)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return read_tables(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


FOLDER = Component(
    kind="checkpoint_format",
    name="folder",
    factory=FolderFormat,
    params=FolderFormatParams,
    summary="a folder with model.safetensors and config.toml",
)
