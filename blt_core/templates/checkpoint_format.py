"""A checkpoint format: a folder with a config, the weights, and the checksums of both.

Change ``Checked``. ``recognises`` is asked about everything, and says yes to its own alone; what it
has written it reads again bit for bit; a write that fails leaves what was there; a damaged file is
a CheckpointError.

Try it:    blt plugins test checkpoint_format acme/name
Contracts: docs/kinds/checkpoint_format.md
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from safetensors.torch import load, save
from torch import Tensor

from blt_core import BuildContext, CheckpointError, Component, hookimpl
from blt_core.storage.folders import current_folder, replace_folder

#: Its presence tells this format from others: choose a name of your own.
SUMS = "acme-sums.json"
CONFIG = "config.json"
WEIGHTS = "weights.safetensors"

#: What configs call the component.
NAME = "acme/name"


@attrs.frozen(kw_only=True)
class CheckedParams:
    """Takes no keys yet."""


class Checked:
    """Reads nothing whose checksum is not the one that was written."""

    def __init__(self, params: CheckedParams, context: BuildContext) -> None:
        pass

    def recognises(self, location: str) -> bool:
        """Whether such a folder is there."""
        return bool(location) and (current_folder(Path(location)) / SUMS).is_file()

    def read(self, location: str) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """The config, and the tensors by name."""
        folder = current_folder(Path(location))
        try:
            sums = json.loads((folder / SUMS).read_bytes())
            found = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
            for name, data in found.items():
                if hashlib.sha256(data).hexdigest() != sums[name]:
                    raise CheckpointError(f"{folder / name}: damaged; copy the folder again")
            return json.loads(found[CONFIG]), load(found[WEIGHTS])
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: damaged, {error}; copy it again") from error

    def write(
        self, location: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """Written beside, then put in its place: at every moment the old or the new is there."""
        weights = save({name: tensors[name].contiguous().clone() for name in tensors})
        written = {CONFIG: json.dumps(config, default=list).encode(), WEIGHTS: weights}
        sums = {name: hashlib.sha256(data).hexdigest() for name, data in written.items()}
        location.parent.mkdir(parents=True, exist_ok=True)
        with replace_folder(location, (SUMS, CONFIG, WEIGHTS)) as new:
            for name, data in {**written, SUMS: json.dumps(sums).encode()}.items():
                (new / name).write_bytes(data)


@hookimpl
def blt_components() -> list[Component]:
    """The format."""
    summary = f"a folder with {SUMS}"
    return [Component("checkpoint_format", NAME, Checked, CheckedParams, summary)]
