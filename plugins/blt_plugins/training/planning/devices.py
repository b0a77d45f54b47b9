"""Devices that a run may be planned for: what makers publish of them, or what the user measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from blt_core.component import at_least, between, more_than
from blt_core.errors import ConfigError, Problem
from blt_core.tables.inline import parse_inline

_POSITIVE = more_than(0)


@attrs.frozen(kw_only=True)
class Device:
    """One device. memory: bytes. flops: floating-point operations a second, at most.

    Those of dense products in bfloat16; float32_flops: in float32. link: bytes a second that a
    device sends to others of its node; network: to those of other nodes. node: devices of a node.
    utilisation: the share of ``flops`` that passes reach.
    """

    memory: float = attrs.field(validator=_POSITIVE)
    flops: float = attrs.field(validator=_POSITIVE)
    float32_flops: float = attrs.field(validator=_POSITIVE)
    link: float = attrs.field(validator=_POSITIVE)
    network: float = attrs.field(validator=_POSITIVE)
    node: int = attrs.field(default=8, validator=at_least(1))
    utilisation: float = attrs.field(default=0.4, validator=between(1e-6, 1))


def _gpu(memory: float, flops: float, float32_flops: float, link: float, network: float) -> Device:
    """In GB, TFLOP/s and GB/s, as data sheets have it."""
    return Device(
        memory=memory * 1e9,
        flops=flops * 1e12,
        float32_flops=float32_flops * 1e12,
        link=link * 1e9,
        network=network * 1e9,
    )


#: From the makers' data sheets: dense bfloat16 without sparsity, the link in one direction, and the
#: network of the makers' own systems of eight (200 or 400 Gb/s a device).
DEVICES: Mapping[str, Device] = {
    "a100": _gpu(80, 312, 19.5, 300, 25),
    "h100": _gpu(80, 989, 67, 450, 50),
    "h200": _gpu(141, 989, 67, 450, 50),
    "b200": _gpu(180, 2250, 75, 900, 50),
    "mi300x": _gpu(192, 1307, 163, 448, 50),
}
#: A device of which every number is given.
OWN = "own"


def parse_device(text: str) -> tuple[str, Device]:
    """Name and numbers of ``h100``, ``h100 utilisation=0.5`` or ``own memory=24e9 flops=…``.

    Raises ConfigError that names what is wrong, at ``--device-type``.
    """
    table = parse_inline(text, "device_type")
    values: dict[str, Any] = {key: table[key] for key in table if key != "use"}
    name = str(table["use"])
    fields = {field.name: field for field in attrs.fields(Device)}
    problems: list[Problem] = []
    place = table.place
    if name not in DEVICES and name != OWN:
        fix = f"one of {', '.join(DEVICES)}, or {OWN} with {', '.join(list(fields)[:5])}"
        problems.append(place.problem(f"no device {name!r} is known", fix))
    for key, value in values.items():
        try:
            _check(fields, key, value)
        except ValueError as error:  # noqa: PERF203 -- all problems are told
            problems.append(place.child(key).problem(str(error)))
    problems += [
        place.child(key).problem("missing")
        for key, field in fields.items()
        if name == OWN and field.default is attrs.NOTHING and key not in values
    ]
    if problems:
        raise ConfigError(problems)
    return name, Device(**values) if name == OWN else attrs.evolve(DEVICES[name], **values)


def _check(fields: Mapping[str, Any], key: str, value: object) -> None:
    """Raise ValueError for a key that devices do not have, and a value that it cannot have."""
    if key not in fields:
        raise ValueError(f"unknown; known are {', '.join(fields)}")
    wanted = (int,) if key == "node" else (int, float)
    if isinstance(value, bool) or not isinstance(value, wanted):
        kind = "a whole number" if key == "node" else "a number"
        raise ValueError(f"expected {kind}, got {value!r}")  # noqa: TRY004 -- as validators do
    fields[key].validator(None, fields[key], value)
