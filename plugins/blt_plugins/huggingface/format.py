"""The format ``huggingface``: folders that transformers' ``BltForCausalLM`` loads and saves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from safetensors.torch import save_file
from torch import Tensor

from blt_core.component import BuildContext, Component, more_than
from blt_core.errors import CheckpointError
from blt_core.files import is_stray, read_json
from blt_core.storage.folders import CONFIG as OTHER_CONFIG
from blt_core.storage.folders import current_folder, replace_folder
from blt_core.storage.safetensors import StoredTensors
from blt_core.storage.tensors import unshared
from blt_plugins.huggingface.reading import tables_of
from blt_plugins.huggingface.tensors import JoinedTensors, layout_of, split_tensors
from blt_plugins.huggingface.writing import config_of

CONFIG, SINGLE = "config.json", "model.safetensors"
INDEX, SHARD = "model.safetensors.index.json", "model-{:05d}-of-{:05d}.safetensors"


@attrs.frozen(kw_only=True)
class HuggingfaceFormatParams:
    """shard_gigabytes: the most that one file of weights holds, where more than one tensor fits."""

    shard_gigabytes: float = attrs.field(default=5.0, validator=more_than(0))


class HuggingfaceFormat:
    """Reads and writes the folders of transformers' BLT models, known by their ``config.json``."""

    def __init__(self, params: HuggingfaceFormatParams, context: BuildContext) -> None:
        self._shard_bytes = int(params.shard_gigabytes * 1e9)

    def recognises(self, location: str) -> bool:
        """Whether ``location`` is a folder with a ``config.json`` and no ``config.toml``."""
        folder = current_folder(Path(location))
        return (folder / CONFIG).is_file() and not (folder / OTHER_CONFIG).exists()

    def read(self, location: str) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """Config tables, and the tensors by the names they have here, read when asked for.

        Raises CheckpointError for files that are missing or damaged, for a model that cannot run
        here, and for tensors that do not fit its config.
        """
        folder = current_folder(Path(location))
        place = folder / CONFIG
        tables = tables_of(_read_json(place), str(place))
        stored = StoredTensors(*_weight_files(folder))
        return tables, JoinedTensors(stored, layout_of(tables), str(folder))

    def write(
        self, location: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """Write a folder that transformers loads; ``config`` has every key.

        Raises CheckpointError for a model that transformers does not have, DataError if something
        else has that name, RunError if it cannot be written.
        """
        settings = config_of(config, str(location))
        dtype = str(tensors["decoder.head.weight"].dtype).removeprefix("torch.")
        shards = list(_shards(dict(split_tensors(tensors, layout_of(config))), self._shard_bytes))
        names = [SINGLE]
        if len(shards) > 1:
            names = [SHARD.format(index + 1, len(shards)) for index in range(len(shards))]
        written = [CONFIG, *names, *([INDEX] if len(shards) > 1 else [])]
        # A model of other shards is replaced by all its files.
        former = _files_of(current_folder(location)) if self.recognises(str(location)) else written
        with replace_folder(location, written, former) as folder:
            _write_json(folder / CONFIG, {**settings, "dtype": dtype})
            for name, shard in zip(names, shards, strict=True):
                whole = {key: tensor.contiguous() for key, tensor in shard.items()}
                save_file(unshared(whole), str(folder / name), metadata={"format": "pt"})
            if len(shards) > 1:
                _write_json(folder / INDEX, _index(names, shards))


def _files_of(folder: Path) -> list[str]:
    """The names of a model's files in its folder."""
    index = [INDEX] if (folder / INDEX).is_file() else []
    return [CONFIG, *index, *(path.name for path in _weight_files(folder))]


def _weight_files(folder: Path) -> list[Path]:
    """The files with a folder's weights. Raises CheckpointError for those that are not there."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        weights = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(n, str) for n in weights.values()):
            raise CheckpointError(f"{folder / INDEX}: weight_map: expected a table of file names")
        files = [folder / name for name in sorted(set(weights.values()))]
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{file}: missing, though {INDEX} names it; download it too")
        return files
    found = sorted(path for path in folder.glob("*.bin") if not is_stray(path.name))
    pickled = next(iter(found), None)
    if pickled is not None:
        raise CheckpointError(
            f"{pickled}: pickled weights can run any program and are not read\n"
            "  fix: have transformers save the model as safetensors, or download it as such"
        )
    raise CheckpointError(f"{folder}: no weights; expected {SINGLE}, or {INDEX} and its files")


def _shards(tensors: Mapping[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups of at most ``most`` bytes, or of one tensor."""
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > most:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _index(names: list[str], shards: list[dict[str, Tensor]]) -> dict[str, Any]:
    files = zip(names, shards, strict=True)
    return {
        "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard.values())},
        "weight_map": {key: name for name, shard in files for key in shard},
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


HUGGINGFACE = Component(
    kind="checkpoint_format",
    name="huggingface",
    factory=HuggingfaceFormat,
    params=HuggingfaceFormatParams,
    summary="a folder of transformers' BLT models, with config.json",
)
