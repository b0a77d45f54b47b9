"""Do a component's methods match its protocol's? A runtime Protocol only looks at their names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Generic, Protocol

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def mismatches(protocol: type, target: object) -> list[str]:
    """How ``target``, a class or an instance, fails to fulfil ``protocol``; empty if it does not.

    Attributes that are no methods are looked for on instances only: a class may set them later.
    """
    methods = dict(_methods(protocol))
    found = [_method_mismatch(name, wanted, target) for name, wanted in methods.items()]
    if not isinstance(target, type):
        found += [
            f"attribute {name!r} is missing"
            for name in sorted(_attributes(protocol) - methods.keys())
            if not hasattr(target, name)
        ]
    return [text for text in found if text]


def _bases(protocol: type) -> Iterator[type]:
    return (base for base in protocol.__mro__ if base not in (object, Protocol, Generic))


def _methods(protocol: type) -> Iterator[tuple[str, inspect.Signature]]:
    for base in _bases(protocol):
        for name, value in vars(base).items():
            if not name.startswith("_") and inspect.isfunction(value):
                yield name, _without_self(inspect.signature(value))


def _attributes(protocol: type) -> set[str]:
    names: set[str] = set()
    for base in _bases(protocol):
        names |= {name for name, value in vars(base).items() if isinstance(value, property)}
        names |= set(inspect.get_annotations(base))
    return {name for name in names if not name.startswith("_")}


def _method_mismatch(name: str, wanted: inspect.Signature, target: object) -> str | None:
    method = getattr(target, name, None)
    # torch gives every module a ``forward``, which only raises.
    if not callable(method) or getattr(method, "__name__", "") == "_forward_unimplemented":
        return f"method {name!r} is missing; expected {name}{_bare(wanted)}"
    try:
        found = inspect.signature(method)
    except ValueError:  # written in C, without a text signature
        return None
    static = inspect.getattr_static(target, name, None)
    if isinstance(target, type) and inspect.isfunction(static):
        found = _without_self(found)
    difference = _difference(wanted, found)
    if difference is None:
        return None
    return (
        f"method {name!r}: {difference}; expected {name}{_bare(wanted)}, found {name}{_bare(found)}"
    )


def _difference(wanted: inspect.Signature, found: inspect.Signature) -> str | None:
    """The first reason why a call that suits ``wanted`` may not suit ``found``."""
    parameters = list(found.parameters.values())
    kinds = {parameter.kind for parameter in parameters}
    swallows_keywords = inspect.Parameter.VAR_KEYWORD in kinds
    swallows_all = swallows_keywords and inspect.Parameter.VAR_POSITIONAL in kinds
    positional = [parameter.name for parameter in parameters if parameter.kind in _POSITIONAL]
    for index, parameter in enumerate(wanted.parameters.values()):
        name, present = parameter.name, found.parameters.get(parameter.name)
        if present is None:
            if swallows_all or (swallows_keywords and parameter.kind not in _POSITIONAL):
                continue
            return f"parameter {name!r} is missing"
        if present.kind is inspect.Parameter.POSITIONAL_ONLY:
            return f"parameter {name!r} cannot be passed by name"
        if parameter.kind in _POSITIONAL and positional[index : index + 1] != [name]:
            return f"parameter {name!r} is not in its place"
    for parameter in parameters:
        if _required(parameter) and parameter.name not in wanted.parameters:
            return f"parameter {parameter.name!r} is not in the protocol and has no default"
    return None


def _required(parameter: inspect.Parameter) -> bool:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in variadic


def _without_self(signature: inspect.Signature) -> inspect.Signature:
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _bare(signature: inspect.Signature) -> str:
    """The signature without its annotations, which only blur what differs."""
    empty: Any = inspect.Parameter.empty
    parameters = [p.replace(annotation=empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=empty))
