"""What checkpoint formats promise."""

from __future__ import annotations

import builtins
import errno
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

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
    """Tensors of which one, ``bad``, cannot be read, as when a disk fails during a write."""

    inner: dict[str, Tensor]
    bad: str

    def __getitem__(self, name: str) -> Tensor:
        if name == self.bad:
            raise OSError("no more can be read")
        return self.inner[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)


@CHECKPOINT_FORMAT.add(
    "atomic",
    "A write that fails, at whatever step, leaves the former model whole; if the new one is in "
    "place already, that.",
)
def _atomic(subject: Subject, _: None) -> None:
    tensors = _contents(subject)[1]
    names = sorted(tensors)
    for bad in (names[0], names[len(names) // 2], names[-1]):
        _interrupted(subject, f"{bad} cannot be read", bad=bad)
    for step in range(MOST_STEPS):
        with _Faulty(step) as files:
            _interrupted(subject, f"file operation {step + 1} fails", files=files)
        if not files.failed:
            break
    _interrupted(subject, "a setting cannot be written", unwritable=object())


def _interrupted(
    subject: Subject,
    what: str,
    *,
    bad: str | None = None,
    files: _Faulty | None = None,
    unwritable: object = None,
) -> None:
    """Broken unless a write over a model that fails leaves it, or the new one, whole."""
    with _folder() as folder:
        found, config, tensors = _written(subject, folder / "model")
        new = {name: tensor + 1 for name, tensor in tensors.items()}
        settings = dict(config["model"])
        settings["context_bytes"] = settings["context_bytes"] + 1
        if unwritable is not None:
            settings["unwritable"] = unwritable
        new_config = {**config, "model": settings}
        given = new if bad is None else _Failing(new, bad)
        failed = False
        try:
            with files.counted() if files is not None else nullcontext():
                found.write(folder / "model", new_config, given)
        except Exception:  # noqa: BLE001 -- whatever it raises, the files are looked at
            failed = True
        if bad is not None and not failed:
            raise Broken("a write whose tensors cannot be read raised nothing")
        whole = [(config, tensors)] if failed else []
        if bad is None and unwritable is None:
            whole.append((new_config, new))
        errors = []
        for each, weights in whole:
            try:
                read_config, read = found.read(str(folder / "model"))
                _same(each, read_config, weights, read)
            except Exception as error:  # noqa: BLE001, PERF203 -- any error says that it is not whole
                errors.append(error)
        if whole and len(errors) == len(whole):
            raise Broken(f"after a failed write ({what}) the former model is lost: {errors[0]}")


#: File operations of a write that are made to fail, at most.
MOST_STEPS = 40


class _Full:
    """A file on a disk that is full."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Full:  # noqa: PYI034 -- typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, _: object) -> int:
        """Raises OSError."""
        raise OSError(errno.ENOSPC, "no space left on device")

    def writelines(self, _: object) -> None:
        """Raises OSError."""
        self.write(_)


class _Faulty:
    """One file operation of Python's that fails: a file cannot be written, or a rename is refused.

    A flush or a new folder is one too. step: which, counted from 0 while :meth:`counted`.
    failed: whether there were so many.
    """

    def __init__(self, step: int) -> None:
        self.step, self.failed = step, False
        self._count, self._on, self._depth = 0, False, 0
        self._patches = ExitStack()

    def __enter__(self) -> _Faulty:  # noqa: PYI034 -- typing.Self is newer than Python 3.10
        for owner, names in (
            (os, ("replace", "rename", "link", "fsync", "mkdir")),
            (Path, ("replace", "rename", "mkdir")),
        ):
            for name in names:
                if hasattr(owner, name):
                    self._patch(owner, name, self._refused)
        for owner, name in ((builtins, "open"), (io, "open"), (Path, "open")):
            self._patch(owner, name, self._full)
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Operations in the block count."""
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def _patch(self, owner: Any, name: str, made: Callable[[Any], Any]) -> None:
        self._patches.enter_context(patch.object(owner, name, made(getattr(owner, name))))

    def _due(self) -> bool:
        """Whether this operation is the one that fails; those within another are not counted."""
        if not self._on or self._depth:
            return False
        self._count += 1
        due = self._count == self.step + 1
        self.failed |= due
        return due

    def _refused(self, real: Any) -> Any:
        def operation(*arguments: Any, **options: Any) -> Any:
            if self._due():
                raise OSError(errno.EIO, "input/output error")
            return self._within(real, arguments, options)

        return operation

    def _full(self, real: Any) -> Any:
        def opened(*arguments: Any, **options: Any) -> Any:
            at = 1  # the mode's place, after a path
            mode = options.get("mode", arguments[at] if len(arguments) > at else "r")
            due = bool({*"wax+"} & {*str(mode)}) and self._due()
            file = self._within(real, arguments, options)
            return _Full(file) if due else file

        return opened

    def _within(self, real: Any, arguments: Any, options: Any) -> Any:
        self._depth += 1
        try:
            return real(*arguments, **options)
        finally:
            self._depth -= 1


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
