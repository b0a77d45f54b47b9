"""Strict structuring: TOML values to attrs classes, with every fault gathered and none coerced.

A cattrs converter dispatches on annotations. All of its own hooks are replaced, for they turn 8.7
into 8 and "false" into True: here each annotation that TOML can spell has a strict hook, and any
other is refused at registration. Hooks raise :class:`Invalid`.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import attrs
import cattrs

from blt_core.component import MANY, NESTED
from blt_core.errors import BltError, Problem, near_match
from blt_core.tables.place import Place, Table

T = TypeVar("T")
Reader = Callable[[Any], Any]
#: Reads one field of a class: (field, value or its default) to what the instance shall hold.
FieldReader = Callable[["attrs.Attribute[Any]", Any], Any]


@attrs.frozen
class Fault:
    """A problem whose place is only known relative to the value that is being read."""

    text: str
    hints: tuple[str, ...] = ()
    path: tuple[str | int, ...] = ()


class Invalid(Exception):  # noqa: N818 -- never leaves the package: ConfigError does
    """The faults of one value, and problems (placed already) of what it holds."""

    def __init__(self, *faults: Fault | Problem) -> None:
        self.faults = faults
        super().__init__(*faults)

    def under(self, key: str | int) -> list[Fault | Problem]:
        """The same faults as seen from the table or list that holds this value at ``key``."""
        return [
            attrs.evolve(fault, path=(key, *fault.path)) if isinstance(fault, Fault) else fault
            for fault in self.faults
        ]

    def placed(self, table: Table) -> list[Problem]:
        """The problems, given the table that was read."""
        return [_placed(fault, table) for fault in self.faults]

    @property
    def problems(self) -> list[Problem]:
        """The problems of a reader that has placed all its faults."""
        return [fault for fault in self.faults if isinstance(fault, Problem)]


def _placed(fault: Fault | Problem, table: Table) -> Problem:
    if isinstance(fault, Problem):
        return fault
    place: Place = table.place
    if fault.path:
        place = table.place_of(str(fault.path[0])).child(*fault.path[1:])
    return place.problem(fault.text, *fault.hints)


class UnsupportedType(TypeError):  # noqa: N818 -- names what it is about
    """An annotation that no TOML value can be checked against."""


def gather(items: Iterable[tuple[Any, Any]], read: Callable[[Any, Any], T]) -> dict[Any, T]:
    """``read(key, item)`` of all pairs; raises one Invalid with the faults of all."""
    results, faults = {}, []
    for key, item in items:
        try:
            results[key] = read(key, item)
        except Invalid as error:  # noqa: PERF203 -- to gather the faults of all
            faults.extend(error.under(key))
    if faults:
        raise Invalid(*faults)
    return results


# -- classes -------------------------------------------------------------------------------------


def read_fields(
    cls: type[T],
    table: Mapping[str, Any],
    owner: str,
    read: FieldReader,
    elsewhere: Callable[[str], str] = lambda _: "",
) -> T:
    """An instance of ``cls`` from a table, its keys read in file order.

    ``owner`` names who takes the keys, as in ``sampler 'ar' (blt-core)``. Absent nested
    components with a default are read like given ones; other absent fields keep their default.
    elsewhere: says of a key that is unknown here who takes it, if anybody does.
    """
    fields = params_fields(cls)
    hint = f"{owner} takes: {', '.join(fields) or 'no keys'}"

    def read_key(key: str, value: Any) -> Any:
        if key not in fields:
            told = elsewhere(key) or near_match(key, fields)
            raise Invalid(Fault(f"unknown key.{told}", (hint,)))
        if value is MISSING:
            raise Invalid(Fault(f"missing; {owner} needs it: {describe_field(fields[key])}"))
        return read(fields[key], value)

    absent = {name: _absent(field) for name, field in fields.items() if name not in table}
    absent = {name: value for name, value in absent.items() if value is not None}
    values = gather([*table.items(), *absent.items()], read_key)
    try:
        return cls(**values)
    except Exception as error:
        raise Invalid(Fault(reason(error, owner))) from error


def read_table(
    cls: type[T],
    table: Table,
    owner: str,
    read: FieldReader | None = None,
    elsewhere: Callable[[str], str] = lambda _: "",
) -> T:
    """:func:`read_fields` of a table that knows its place: raises Invalid with problems only."""
    try:
        return read_fields(cls, table, owner, read or read_value, elsewhere)
    except Invalid as error:
        raise Invalid(*error.placed(table)) from error


def read_value(field: attrs.Attribute[Any], value: Any) -> Any:
    """Read a field that holds plain values, and apply its validator."""
    kind: Any = field.type
    result = reader(kind)(value)
    if field.validator is not None:
        try:
            field.validator(None, field, result)
        except Exception as error:
            raise Invalid(Fault(reason(error))) from error
    return result


def reason(error: Exception, owner: str = "") -> str:
    """What an error of a component says; those that are not meant for users with type and owner."""
    if isinstance(error, (ValueError, BltError)):
        return str(error)
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return f"{owner} failed: {text}" if owner else text


def params_fields(cls: type) -> dict[str, attrs.Attribute[Any]]:
    """The fields that a table may set, annotations resolved."""
    return {field.name: field for field in attrs.fields(attrs.resolve_types(cls)) if field.init}


def check_params(cls: type) -> None:
    """Raise UnsupportedType unless ``cls`` is an attrs class whose fields a table can spell."""
    if not (isinstance(cls, type) and attrs.has(cls)):
        raise UnsupportedType(f"params must be an attrs class, not {cls!r}")
    try:
        fields = params_fields(cls)
    except NameError as error:
        raise UnsupportedType(
            f"{cls.__name__}: an annotation cannot be resolved: {error}"
        ) from error
    for name, field in fields.items():
        if name == "use" or name.startswith("_"):
            raise UnsupportedType(f"{cls.__name__}.{name}: this name cannot be a key")
        if field.type is None:
            raise UnsupportedType(f"{cls.__name__}.{name}: has no annotation")
        if NESTED in field.metadata:
            continue
        if type(None) in get_args(field.type) and field.default is not None:
            text = "its type allows None, so None must be its default: TOML has no null to set it"
            raise UnsupportedType(f"{cls.__name__}.{name}: {text}")
        try:
            kind: Any = field.type
            reader(kind)
        except UnsupportedType as error:
            raise UnsupportedType(f"{cls.__name__}.{name}: {error}") from error


def describe_field(field: attrs.Attribute[Any]) -> str:
    """What a field wants, as in ``int`` or ``a table that names a drafter``."""
    kind = field.metadata.get(NESTED)
    if not kind:
        return type_name(field.type)
    one = f"a table that names {article(kind)}"
    return f"under each of some names, {one}" if MANY in field.metadata else one


def plain(value: object, skip: Collection[str] = ()) -> Any:
    """The TOML values that read back as ``value``, less the fields in ``skip``."""
    if not attrs.has(type(value)):
        return CONVERTER.unstructure(value)
    held = {name: getattr(value, name) for name in params_fields(type(value)) if name not in skip}
    # TOML cannot spell None; an absent key says it, for None is the default of what may be None.
    return {name: plain(item) for name, item in held.items() if item is not None}


MISSING = object()


def _absent(field: attrs.Attribute[Any]) -> Any:
    """What to read for an absent key: MISSING, a nested default, or None to leave it alone."""
    if field.default is attrs.NOTHING:
        return MISSING
    return default_of(field) if NESTED in field.metadata else None


def default_of(field: attrs.Attribute[Any]) -> Any:
    """What an absent key stands for; NOTHING if it is required, or depends on other keys."""
    default: Any = field.default
    if not isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return default
    return attrs.NOTHING if default.takes_self else default.factory()


# -- types ---------------------------------------------------------------------------------------

_NAMES: Mapping[Any, str] = {Path: "str", type(None): "nothing"}


#: Characters of a value that a message shows.
_SHOWN = 60


def article(kind: str) -> str:
    """A kind in a sentence: ``an encoder``, ``a global model``."""
    words = kind.replace("_", " ")
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def show(value: object) -> str:
    """A value found in a table, with its type: ``float 8.5``, ``bool true``, ``a table``."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, bool):
        return f"bool {str(value).lower()}"
    # Python refuses to write integers of thousands of digits, except in hexadecimal.
    huge = isinstance(value, int) and value.bit_length() > 4 * _SHOWN
    text = f"{value:#x}" if huge else repr(value)
    return f"{type(value).__name__} {text if len(text) <= _SHOWN else text[:_SHOWN] + '…'}"


def type_name(kind: Any) -> str:  # noqa: PLR0911 -- one for each sort of type
    """An annotation in words: ``int``, ``list of str``, ``'a' or 'b'``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(each) for each in arguments if each is not type(None))
    if origin in (list, tuple) and arguments:
        return f"a list of {type_name(arguments[0])}"
    if _is_subclass(origin, Mapping):
        return f"a table of {type_name(arguments[1])}"
    if _is_subclass(kind, enum.Enum):
        return " or ".join(repr(member.value) for member in kind)
    if isinstance(kind, type) and attrs.has(kind):
        return "a table"
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def _mismatch(kind: Any, value: object) -> Invalid:
    return Invalid(Fault(f"expected {type_name(kind)}, got {show(value)}"))


def _is_subclass(kind: Any, parent: type | tuple[type, ...]) -> bool:
    return isinstance(kind, type) and issubclass(kind, parent)


_SCALARS: Mapping[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (float, int),
    str: (str,),
    Path: (str,),
    type(None): (type(None),),
}


def reader(kind: Any) -> Reader:
    """The function that reads values of an annotation; UnsupportedType if no table can spell it."""
    if _is_subclass(kind, _BUILT_IN):
        return _reader(kind)
    hook = CONVERTER.get_structure_hook(kind)
    return lambda value: hook(value, kind)


#: cattrs has hooks for these, and for what inherits from them, that come before any factory.
_BUILT_IN = (str, bytes, int, float, Path)


def _hook(kind: Any) -> Callable[[Any, Any], Any]:
    """The strict cattrs hook of an annotation."""
    read = _reader(kind)
    return lambda value, _: read(value)


def _reader(kind: Any) -> Reader:  # noqa: PLR0911 -- one for each sort of type
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in _SCALARS:
        return _scalar(kind, _SCALARS[kind])
    if origin is Literal:
        return functools.partial(_choice, {choice: choice for choice in arguments})
    if _is_subclass(kind, enum.Enum):
        return functools.partial(_choice, {member.value: member for member in kind})
    if origin in (Union, types.UnionType):
        return _union(kind, {member: reader(member) for member in arguments})
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        return _list(kind, reader(arguments[0]))
    if _is_subclass(origin, Mapping) and arguments[0] is str:
        return _mapping(kind, reader(arguments[1]))
    if isinstance(kind, type) and attrs.has(kind):
        check_params(kind)
        return _instance(kind)
    raise UnsupportedType(f"{kind!r} is not a type that a TOML table can spell")


def _scalar(kind: Any, accepted: tuple[type, ...]) -> Reader:
    def read(value: Any) -> Any:
        # type(), not isinstance(): to Python True is an int, in a table it is a slip.
        if type(value) not in accepted:
            raise _mismatch(kind, value)
        try:
            return None if value is None else kind(value)
        except OverflowError as error:  # an integer that no float can hold
            raise Invalid(Fault("too large for a float")) from error

    return read


def _choice(choices: Mapping[Any, Any], value: Any) -> Any:
    for choice, result in choices.items():
        if type(choice) is type(value) and choice == value:
            return result
    wanted = ", ".join(repr(choice) for choice in choices)
    names = [choice for choice in choices if isinstance(choice, str)]
    near = near_match(value, names) if isinstance(value, str) else ""
    raise Invalid(Fault(f"expected one of {wanted}, got {show(value)}" + (near and f".{near}")))


def _list(kind: Any, element: Reader) -> Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise _mismatch(kind, value)
        results = gather(enumerate(value), lambda _, item: element(item))
        return get_origin(kind)(results.values())

    return read


def _mapping(kind: Any, element: Reader) -> Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _mismatch(kind, value)
        return gather(value.items(), lambda _, item: element(item))

    return read


def _union(kind: Any, members: Mapping[Any, Reader]) -> Reader:
    named = [member for member in members if member is not type(None)]

    def read(value: Any) -> Any:
        for member, each in members.items():
            try:
                return each(value)
            except Invalid:  # noqa: PERF203 -- the next member may accept it
                # ``X | None``: what is wrong with the X says more than that it is no X.
                if named == [member] and value is not None:
                    raise
        raise _mismatch(kind, value)

    return read


def _instance(kind: Any) -> Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _mismatch(kind, value)
        return read_fields(kind, value, "this table", read_value)

    return read


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter()
    converter.register_structure_hook_factory(lambda _: True)(_hook)
    converter.register_unstructure_hook(Path, str)
    converter.register_unstructure_hook(tuple, lambda items: [plain(item) for item in items])
    converter.register_unstructure_hook_factory(attrs.has)(lambda _: plain)
    return converter


#: Plugins may register hooks for types of their own (``register_structure_hook``).
CONVERTER = _make_converter()
