"""Component records: what a plugin tells the core about each thing that it supplies.

A component's *params* class is an attrs class; its fields are the keys of the component's TOML
table, its annotations their types, its validators their ranges. A field made with :func:`nested`
holds another component, chosen by a nested table with its own ``use``; one made with
:func:`nested_table` holds any number of them, each under a name. The factory is called with an
instance of params in which nested fields already hold the built objects.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import attrs

from blt_core.errors import PluginError
from blt_core.types import IdScheme, Parameters

#: Key of the attrs metadata that marks a nested component field.
NESTED = "blt_nested_kind"
#: The same for a field that holds a table of them, by name.
MANY = "blt_many"
#: Key of the attrs metadata that marks a key which a run may override in a checkpoint's config.
OVERRIDABLE = "blt_overridable"
#: The same for a key that only training from a checkpoint may change.
TRAINED = "blt_trained"


def _no_checkpoint(location: str) -> Any:
    raise PluginError(f"{location}: no other checkpoint can be read here")


@attrs.frozen
class BuildContext:
    """What factories may need beyond their own params.

    scheme: the ids of the model. load_model(checkpoint): the model of another checkpoint, on the
    same device and in the same dtype; raises CheckpointError or ConfigError. nested: what all of
    the components of a kind can do that are nested in the one to be built, as
    ``"drafter.stops_early"``. device, dtype: of the run, as ``"cpu"`` and ``"float32"``, and
    parameters, the sizes of its model; None where nothing runs. variant: how its passes are run
    besides (kernels, compiled passes, the scorer's dtype), as ``Model.variant`` tells it.
    abilities: what the model's parts can do, as ``"decoder.denoises"``.
    """

    scheme: IdScheme = attrs.field(factory=IdScheme)
    load_model: Callable[[str], Any] = _no_checkpoint
    nested: frozenset[str] = frozenset()
    device: str | None = None
    dtype: str | None = None
    variant: str | None = None
    parameters: Parameters | None = None
    abilities: frozenset[str] = frozenset()


class Ability(NamedTuple):
    """How messages speak of an ability: "needs a decoder {need}; 'local' … {lack}"."""

    need: str
    lack: str


#: Abilities with a phrase of their own; a plugin may use any other name and gets a plain one.
ABILITIES: Mapping[str, Ability] = {
    "denoises": Ability("that denoises", "was trained without blocks"),
    "reads_byte_states": Ability("that reads byte states", "embeds bytes by itself"),
    "stops_early": Ability("that can stop early", "knows no probabilities to stop by"),
    "gives_q": Ability("that tells what it draws from", "does not draw its bytes one by one"),
}


def _nothing(params: object) -> frozenset[str]:  # noqa: ARG001 -- a default for a callback
    return frozenset()


def _no_notes(params: object) -> Iterable[str]:  # noqa: ARG001 -- a default for a callback
    return ()


@attrs.frozen
class Component:
    """One implementation of a kind.

    kind, name: what a config names (``[kind] use = "name"``). factory(params, context): builds it.
    params: attrs class of its TOML keys. summary: one line for ``blt plugins``. dims: named sizes
    and the params field that holds each; components that name the same size must agree on it.
    provides(params): abilities, such as ``denoises``. requires: abilities of other parts that it
    cannot work without, as ``"decoder.denoises"``: of a part that it nests, or else of one beside
    it, or else of a top-level one. notes(params): what a user should know of keys
    that are served but hardly meant; nested fields of ``params`` hold the nodes of a plan.
    """

    kind: str
    name: str
    factory: Callable[[Any, BuildContext], object]
    params: type
    summary: str
    dims: Mapping[str, str] = attrs.field(factory=dict)
    provides: Callable[[Any], frozenset[str]] = _nothing
    requires: frozenset[str] = frozenset()
    notes: Callable[[Any], Iterable[str]] = _no_notes


def abilities_of(child: Any) -> frozenset[str]:
    """What a nested component can do; ``child`` is its node, as ``provides`` is given it."""
    found: frozenset[str] = child.component.provides(child.params)
    return found


@attrs.frozen
class Preset:
    """A name for a table of another component of the same kind.

    expand(params) gives that table, ``use`` included: ``blt-s`` is ``speculative`` with the drafter
    ``self``. ``blt check`` prints the expansion. adapts: whether it is expand(params, abilities),
    with what the parts of the model can do, as ``"decoder.denoises"``.
    """

    kind: str
    name: str
    params: type
    expand: Callable[..., dict[str, Any]]
    summary: str
    adapts: bool = False


def _import_path(_: object, __: attrs.Attribute[str], value: str) -> None:
    if not re.fullmatch(r"[\w.]+:\w+", value):
        raise ValueError(f"expected an import path such as 'package.module:Name', got {value!r}")


@attrs.frozen
class Kind:
    """A kind of component: ``protocol`` is the import path of its contract.

    ``root``: whether it may be a top-level table of a config. contracts: import path of what
    components of the kind are tested for, a ``Contracts`` of :mod:`blt_core.testing`; empty if
    nothing is. template: a module with a component ``acme/name`` of the kind that works, beside a
    TOML file of the same name that uses it, for ``blt new-plugin``; empty if there is none.
    """

    protocol: str = attrs.field(validator=_import_path)
    summary: str
    root: bool = False
    contracts: str = attrs.field(
        default="", validator=attrs.validators.or_(attrs.validators.in_([""]), _import_path)
    )
    template: str = attrs.field(default="", validator=attrs.validators.matches_re(r"[\w.]*"))

    def load_protocol(self) -> type:
        """Import the protocol class; PluginError if it is not there."""
        module, _, name = self.protocol.partition(":")
        try:
            protocol = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise PluginError(f"protocol {self.protocol!r} cannot be imported: {error}") from error
        return protocol  # type: ignore[no-any-return]


def nested(kind: str, *, default: str | None = None) -> Any:
    """An attrs field that holds a component of ``kind``; ``default`` names it if no table does."""
    metadata = {NESTED: kind}
    if default is None:
        return attrs.field(metadata=metadata)
    return attrs.field(factory=lambda: {"use": default}, metadata=metadata)


def nested_table(kind: str, *, example: str | None = None) -> Any:
    """An attrs field that holds components of ``kind`` by names that the config chooses.

    example: if given, there must be at least one, and the message shows it.
    """

    def some(_: object, __: attrs.Attribute[Any], value: Mapping[str, Any]) -> None:
        if example is not None and not value:
            raise ValueError(f"expected at least one {kind}, as in {example}")

    return attrs.field(metadata={NESTED: kind, MANY: True}, validator=some)


def overridable(**arguments: Any) -> Any:
    """An attrs field that a run may set beside ``checkpoint`` (thresholds, windows; not dims)."""
    return attrs.field(metadata={OVERRIDABLE: True}, **arguments)


def trained(**arguments: Any) -> Any:
    """An attrs field that says what a part was trained to do: training may set it, a run not."""
    return attrs.field(metadata={TRAINED: True}, **arguments)


def nested_kinds(params: type) -> dict[str, str]:
    """Nested component fields of a params class: field name to kind."""
    return {f.name: f.metadata[NESTED] for f in attrs.fields(params) if NESTED in f.metadata}


def overridable_keys(params: type, *, training: bool = False) -> frozenset[str]:
    """Keys of a params class that a run, or training, may override beside a checkpoint."""
    free = frozenset(f.name for f in attrs.fields(params) if OVERRIDABLE in f.metadata)
    return free | trained_keys(params) if training else free


def trained_keys(params: type) -> frozenset[str]:
    """Keys of a params class that say what the part was trained to do."""
    return frozenset(f.name for f in attrs.fields(params) if TRAINED in f.metadata)


# -- ranges: validators for params fields; None passes, since the annotation says if it may be ----

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def at_least(low: float) -> Validator:
    """Finite values from ``low`` on."""
    return attrs.validators.and_(_FINITE, _Range(lambda value: value >= low, f"at least {low}"))


def more_than(low: float) -> Validator:
    """Finite values above ``low``."""
    return attrs.validators.and_(_FINITE, _Range(lambda value: value > low, f"more than {low}"))


def between(low: float, high: float) -> Validator:
    """Values from ``low`` to ``high``, both included."""
    return _Range(lambda value: low <= value <= high, f"{low} to {high}")


def one_of(*choices: object) -> Validator:
    """One of a few values; for strings, a ``Literal`` annotation says it better."""
    return _Range(lambda value: value in choices, "one of " + ", ".join(map(repr, choices)))


def not_empty() -> Validator:
    """Strings of at least one character."""
    return _Range(lambda value: value != "", "a text that is not empty")


def range_of(field: attrs.Attribute[Any]) -> str:
    """The values that a field's validators accept, in words: ``at least 1``; else empty."""
    found = list(dict.fromkeys(_wanted(field.validator)))
    return ", ".join(found if len(found) == 1 else [w for w in found if w != _FINITE.wanted])


def _wanted(validator: object) -> list[str]:
    if wanted := getattr(validator, "wanted", ""):
        return [wanted]
    # What attrs makes of several validators.
    return [text for each in getattr(validator, "_validators", ()) for text in _wanted(each)]


@attrs.frozen
class _Range:
    """A validator that says what it accepts; one of a plugin may have ``wanted`` as well."""

    accepts: Callable[[Any], bool]
    wanted: str

    def __call__(self, _: object, __: attrs.Attribute[Any], value: Any) -> None:
        if value is not None and not self.accepts(value):
            raise ValueError(f"expected {self.wanted}, got {value!r}")


_FINITE = _Range(lambda value: -math.inf < value < math.inf, "a finite number")
