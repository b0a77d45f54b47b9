"""What checkpoint formats promise."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from blt_core.errors import BltError
from blt_core.storage.tensors import model_config, model_tensors
from blt_core.testing.contracts import Broken, Contracts, NotPromised, require
from blt_core.testing.subject import Subject

CHECKPOINT_FORMAT = Contracts("checkpoint_format")


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="blt-") as name:
        yield Path(name)


def _contents(subject: Subject) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config with every key, and tensors of several dtypes."""
    tensors = model_tensors(subject.model, torch.float32)
    narrow = next(name for name in sorted(tensors) if name.startswith("decoder."))
    tensors[narrow] = tensors[narrow].to(torch.bfloat16)
    return model_config(subject.model), tensors


def _written(subject: Subject, folder: Path) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """The format, and what it wrote to a folder; NotPromised for one that does not write."""
    found = subject.build()
    config, tensors = _contents(subject)
    try:
        found.write(folder, config, tensors)
    except BltError as error:
        raise NotPromised(f"it does not write: {error}") from error
    return found, config, tensors


@CHECKPOINT_FORMAT.add(
    "elsewhere",
    "`recognises` says no, and raises nothing, for what is not there, empty folders and other "
    "files.",
)
def _elsewhere(subject: Subject, _: None) -> None:
    found = subject.build()
    with _folder() as folder:
        (folder / "empty").mkdir()
        (folder / "text").mkdir()
        (folder / "text" / "readme.txt").write_text("no model")
        (folder / "file").write_bytes(b"\x00\x01")
        for name in ("missing", "empty", "text", "file", "text/readme.txt"):
            said = found.recognises(str(folder / name))
            require(said is False, f"recognises gave {said!r} for {name}, no checkpoint of its")
        for name in ("unknown:thing", ""):
            said = found.recognises(name)
            require(said is False, f"recognises gave {said!r} for {name!r}")


@CHECKPOINT_FORMAT.add("recognises", "`recognises` says yes to what it has written.")
def _recognises(subject: Subject, _: None) -> None:
    with _folder() as folder:
        found, *_rest = _written(subject, folder / "model")
        said = found.recognises(str(folder / "model"))
        require(said is True, f"recognises gave {said!r} for what it has written itself")


@CHECKPOINT_FORMAT.add(
    "round-trip",
    "What it has written it reads again: the config, and every tensor bit for bit, in its dtype.",
)
def _round_trip(subject: Subject, _: None) -> None:
    with _folder() as folder:
        found, config, tensors = _written(subject, folder / "model")
        read_config, read = found.read(str(folder / "model"))
        _same(config, read_config, tensors, read)


def _same(
    config: Mapping[str, Any],
    read_config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    read: Mapping[str, Tensor],
) -> None:
    for key in config:
        if key != "schema" and _plain(read_config.get(key)) != _plain(config[key]):
            raise Broken(f"the table [{key}] came back as {read_config.get(key)!r}")
    lost, new = tensors.keys() - read.keys(), read.keys() - tensors.keys()
    require(not lost and not new, f"tensors lost: {sorted(lost)}; surplus: {sorted(new)}")
    for name, tensor in tensors.items():
        back = read[name]
        if back.dtype != tensor.dtype or back.shape != tensor.shape:
            raise Broken(f"{name} came back as {back.dtype} {tuple(back.shape)}")
        if not torch.equal(
            back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        ):
            raise Broken(f"{name} came back with other numbers")


def _plain(value: Any) -> Any:
    """Tables and lists as plain dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items() if each is not None}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


@attrs.frozen
class _Failing(Mapping[str, Tensor]):
    """Tensors of which one cannot be read, as when a disk fails while a model is written."""

    inner: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name == sorted(self.inner)[len(self.inner) // 2]:
            raise OSError("no more can be read")
        return self.inner[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)


@CHECKPOINT_FORMAT.add(
    "atomic",
    "A write that fails leaves what was there before, whole.",
)
def _atomic(subject: Subject, _: None) -> None:
    with _folder() as folder:
        found, config, tensors = _written(subject, folder / "model")
        other = {name: tensor + 1 for name, tensor in tensors.items()}
        try:
            found.write(folder / "model", {**config, "schema": 1}, _Failing(other))
        except Exception:  # noqa: BLE001, S110 -- whatever it raises, the files are looked at
            pass
        else:
            raise Broken("a write whose tensors cannot be read raised nothing")
        try:
            read_config, read = found.read(str(folder / "model"))
            _same(config, read_config, tensors, read)
        except Exception as error:
            raise Broken(f"after a failed write the former model is lost: {error}") from error


@CHECKPOINT_FORMAT.add(
    "damaged",
    "A file that is cut short is an error of ours (CheckpointError), never other numbers.",
)
def _damaged(subject: Subject, _: None) -> None:
    with _folder() as folder:
        found, config, tensors = _written(subject, folder / "model")
        files = [path for path in sorted((folder / "model").rglob("*")) if path.is_file()]
        for path in files:
            whole = path.read_bytes()
            if len(whole) < 2:  # noqa: PLR2004 -- nothing to cut
                continue
            path.write_bytes(whole[: len(whole) // 2])
            try:
                read_config, read = found.read(str(folder / "model"))
                _same(config, read_config, tensors, dict(read))
            except BltError:
                pass
            except Broken as error:
                text = f"with half of {path.name} it gives another model: {error}"
                raise Broken(text) from error
            except Exception as error:
                text = (
                    f"with half of {path.name} it raises {type(error).__name__}, no CheckpointError"
                )
                raise Broken(text) from error
            path.write_bytes(whole)
