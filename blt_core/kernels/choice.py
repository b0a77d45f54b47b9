"""Choices of kernels, and the files that keep them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor

from blt_core.errors import DataError
from blt_core.files import parse_json, read_json
from blt_core.kernels.candidates import KERNELS, ROW_CLASSES
from blt_core.kernels.machine import Machine, machine
from blt_core.kernels.native import native_hash
from blt_core.nn.linear import fixed_rule
from blt_core.storage.folders import replace_file
from blt_core.storage.user_cache import cache_folder

SCHEMA = 1

W = TypeVar("W")
#: How much faster than the kernel of before another has to be to take its place.
HYSTERESIS = 0.10

#: Names of kernels by weight (see :func:`name_of`), then by class of rows.
Names = Mapping[str, Mapping[str, str]]
#: Seconds that reading a weight once took, by weight, class of rows and kernel.
Times = Mapping[str, Mapping[str, Mapping[str, float]]]


def name_of(weight: Tensor) -> str:
    """What weights that have one choice are called: ``bfloat16 1024x2048``, (out, in)."""
    n, k = weight.shape
    return f"{str(weight.dtype).removeprefix('torch.')} {n}x{k}"


@attrs.frozen
class Choice:
    """Which kernel serves which weight and class of rows; what it does not name is by fixed rule.

    machine: whose choice it is. native: the hash of the native kernel's source, if it was there.
    """

    names: Names
    machine: Machine = attrs.field(factory=machine)
    native: str | None = attrs.field(factory=native_hash)

    def digest(self) -> str:
        """A name for all that may change the bytes of an output: the kernels, by weight."""
        told = json.dumps([self.names, self.native_used], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    @property
    def native_used(self) -> str | None:
        """The hash of the native kernel, where it is chosen."""
        return self.native if self.uses("native") else None

    def uses(self, kernel: str) -> bool:
        """Whether a kernel is chosen anywhere."""
        return any(kernel in each.values() for each in self.names.values())

    def lacking(self, weights: Mapping[str, W]) -> dict[str, W]:
        """Those of ``weights``, by name, for which something is not chosen yet."""
        return {
            name: own
            for name, own in weights.items()
            if len(self.names.get(name, {})) < len(ROW_CLASSES)
        }

    def filled(self, weights: Iterable[str]) -> Choice:
        """A copy in which the fixed rule is chosen for what it lacks of ``weights``."""
        rules = {
            name: {c: fixed_rule(_dtype(name), rows) for c, rows in ROW_CLASSES.items()}
            for name in weights
        }
        names = {
            name: {**rules.get(name, {}), **self.names.get(name, {})}
            for name in {**self.names, **rules}
        }
        return attrs.evolve(self, names=names)

    def of(self, weights: Mapping[str, object]) -> Choice:
        """The part for ``weights``, by their names."""
        return attrs.evolve(self, names={k: v for k, v in self.names.items() if k in weights})

    def changed_by(self, times: Times) -> Choice:
        """A copy with what was measured. The kernel of before stays unless one is clearly faster.

        That is the fixed rule's where there was none.
        """
        names = {weight: dict(each) for weight, each in self.names.items()}
        for weight, classes in times.items():
            for rows_class, found in classes.items():
                own = names.setdefault(weight, {})
                own[rows_class] = _chosen(weight, rows_class, own.get(rows_class), found)
        return attrs.evolve(self, names=names)

    def joined(self, other: Choice) -> Choice:
        """A copy with what it lacks of another's."""
        weights = {**other.names, **self.names}
        names = {w: {**other.names.get(w, {}), **self.names.get(w, {})} for w in weights}
        return attrs.evolve(self, names=names, native=self.native_used or other.native_used)

    def text(self) -> str:
        """What the digest names, on one line; ``[run] kernels`` takes it as it takes a file."""
        told = {"schema": SCHEMA, "names": self.names, "native": self.native_used}
        return json.dumps(told, sort_keys=True)

    def write(self, path: Path) -> None:
        """Keep it in a file. Raises OSError where that cannot be written."""
        record = {"schema": SCHEMA, **attrs.asdict(self)}
        with replace_file(path) as file:
            file.write(json.dumps(record, indent=1).encode() + b"\n")


def _chosen(weight: str, rows_class: str, before: str | None, found: Mapping[str, float]) -> str:
    if before is None or before not in found:
        before = fixed_rule(_dtype(weight), ROW_CLASSES[rows_class])
    # A copy costs memory: it has to be clearly faster than what needs none, too.
    costs = {n: t * (1 + HYSTERESIS) if KERNELS[n].copies else t for n, t in found.items()}
    best = min(costs, key=lambda name: costs[name])
    return best if costs[best] * (1 + HYSTERESIS) < found.get(before, math.inf) else before


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name.partition(" ")[0])
    return dtype


def stored_at() -> Path:
    """Where the choice for this machine is kept, as torch and its threads are now."""
    key = json.dumps([attrs.asdict(machine()), native_hash()])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return cache_folder() / "kernels" / f"choice-{name}.json"


def read_choice(path: Path) -> tuple[Choice, bool]:
    """The choice in a file, or that which results in one were begun with; whether it is the latter.

    Raises DataError with what is wrong.
    """
    try:
        with path.open("rb") as file:
            begun_with = _of_results(file.readline())
        return _parsed(begun_with or read_json(path)), begun_with is not None
    except OSError as error:
        raise DataError(f"{path}: no choice of kernels: {error.strerror or error}") from error
    except ValueError as error:
        raise _no_choice(path, error) from error


def parse_choice(text: str) -> Choice:
    """The choice that :meth:`Choice.text` gave; DataError with what is wrong."""
    try:
        return _parsed(parse_json(text.encode()))
    except ValueError as error:
        raise _no_choice("[run] kernels", error) from error


def _of_results(line: bytes) -> Any:
    """The choice in the first line of results; None where that is no such line."""
    try:
        head = parse_json(line)
    except ValueError:
        return None
    if not (isinstance(head, dict) and "format" in head):
        return None
    if head.get("kernels") is None:
        raise ValueError("these results were begun without one, with kernels = fixed")
    return head["kernels"]


def _no_choice(where: object, error: Exception) -> DataError:
    return DataError(
        f"{where}: no choice of kernels: {error}\n"
        "  fix: name a file that blt bench-kernels has written, or measured, or fixed"
    )


def _parsed(record: Any) -> Choice:
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"expected a table with schema = {SCHEMA}")
    try:
        native = record["native"]
        of = Machine(**record["machine"]) if "machine" in record else machine()
        names = {str(weight): dict(each) for weight, each in record["names"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"a part is missing or of another shape ({error})") from error
    if native is not None and not isinstance(native, str):
        raise ValueError(f"native = {native!r} is no hash")
    for weight, each in names.items():
        for rows_class, name in each.items():
            known = isinstance(name, str) and name in KERNELS
            if rows_class not in ROW_CLASSES or not known:
                raise ValueError(f"{weight}: {rows_class!r} = {name!r} is unknown")
    return Choice(names, of, native)
