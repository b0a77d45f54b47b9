"""Which component an error comes from.

What is built is remembered with its name, and an error is named after the innermost component in
its traceback. So naming costs nothing until something fails.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from blt_core.errors import BltError, ComponentError, EngineError

#: Names of the built components that are in use, by identity, and of their classes for copies.
_instances: dict[int, tuple[weakref.ref[object], str]] = {}
_classes: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()


#: Packages whose classes (an ``nn.Sequential``, a function, a partial) many components share.
_SHARED = frozenset((*sys.stdlib_module_names, "torch", "builtins"))


def remember(component: object, name: str) -> None:
    """Remember what a built component is called, as long as it is in use."""
    if str(type(component).__module__).partition(".")[0] not in _SHARED:
        _classes[type(component)] = name
    key = id(component)
    with contextlib.suppress(TypeError):  # its class has slots, and none for weak references
        _instances[key] = weakref.ref(component, lambda _: _instances.pop(key, None)), name


def name_of(component: object) -> str:
    """``drafter 'acme/echo' (blt-acme)``, or the class of what was not built from a config."""
    return _known(component) or type(component).__name__


def broken(component: object, text: str, contract: str = "") -> ComponentError:
    """The error for a component that breaks a contract of its kind, as ``patcher.shape``."""
    return ComponentError(f"{name_of(component)} {text}", contract=contract)


@contextlib.contextmanager
def naming(running: object = None) -> Iterator[None]:
    """Name the component that an error comes from; the error itself becomes the cause.

    Raises ComponentError for an error within a component, and EngineError with a name where one
    breaks the contract of the engine: the innermost, or else ``running``. Errors that are meant for
    users, and those that come from no component, pass as they are.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        named = _named(error, running)
        if named is error:
            raise
        raise named from error


def _named(error: Exception | SystemExit, running: object) -> Exception | SystemExit:
    if isinstance(error, EngineError):
        return error if error.component else _named_engine_error(error, running)
    if isinstance(error, BltError) or _is_nobodys(error):
        return error
    name, frames = _innermost(error)
    if not name:
        return error
    what = "".join(traceback.format_exception_only(error)).strip()
    place = f"{Path(frames[-1].f_code.co_filename).name}:{frames[-1].f_lineno}"
    if any(_is_engine(frame) for frame in frames[1:]):
        return ComponentError(
            f"{what} ({place}), in a call by {name}",
            ("a part that the engine called may have returned what its protocol does not allow",),
        )
    return ComponentError(f"{name} failed: {what} ({place})")


def _is_nobodys(error: BaseException) -> bool:
    """Whether an error is no component's fault: memory has run out."""
    torch = sys.modules.get("torch")  # which takes seconds to import, and an error here does not
    return isinstance(error, (MemoryError, torch.OutOfMemoryError) if torch else MemoryError)


def _named_engine_error(error: EngineError, running: object) -> EngineError:
    name, _ = _innermost(error)
    name = name or (name_of(running) if running is not None else "")
    return EngineError(error.text, name, error.contract) if name else error


def _innermost(error: BaseException) -> tuple[str, list[FrameType]]:
    """The innermost component in a traceback, and the frames from its own on."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for index in range(len(frames) - 1, -1, -1):
        code = frames[index].f_code
        own = frames[index].f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if own is not None and (name := _known(own)):
            return name, frames[index:]
    return "", []


def _known(component: object) -> str:
    reference, name = _instances.get(id(component), (None, ""))
    if reference is not None and reference() is component:
        return name
    return _classes.get(type(component), "")


def _is_engine(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    return module in ("blt_core.decoding.state", "blt_core.decoding.passes")
