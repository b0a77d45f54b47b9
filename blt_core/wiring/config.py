"""Configurations: TOML tables that name components, and the settings of a run and of a model.

Reading a file finds syntax errors only. What the tables say is checked by
:func:`blt_core.wiring.resolve.resolve`, all at once, because most of it depends on the plugins.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from blt_core.component import at_least, between, more_than, not_empty
from blt_core.errors import Problem
from blt_core.files import expand_home
from blt_core.tables.place import Place, Table, read_toml
from blt_core.types import IdScheme, Sampling

#: The version of the config format that this code reads.
SCHEMA = 1


Dtype = Literal["float32", "float64", "bfloat16"]


def _no_empty_stop(_: object, __: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
    if "" in value:
        raise ValueError("an empty stop string would end every text at once")


def _default_kernels() -> str:
    return os.environ.get("BLT_KERNELS") or "measured"


@attrs.frozen
class RunSettings:
    """``[run]``: what to run, on what, and the defaults of a generation request.

    ``checkpoint``: a path (``~`` is the home folder) or ``demo:…``; it gives the model parts.
    ``scorer_dtype``: of the patcher and its byte scorer, float32 at least unless it is given here.
    ``kernels``: of products on a CPU: ``measured``, ``fixed``, or a file with a choice; by default
    what the variable ``BLT_KERNELS`` says, or ``measured``.
    ``compile``: whether passes of decoding are compiled on first use, where they can be.
    ``stop``: texts that end the output.
    """

    checkpoint: str | None = attrs.field(
        default=None, validator=not_empty(), converter=attrs.converters.optional(expand_home)
    )
    device: str = "cpu"
    dtype: Dtype = "float32"
    scorer_dtype: Dtype | None = None
    kernels: str = attrs.field(
        factory=_default_kernels, validator=not_empty(), converter=expand_home
    )
    compile: bool = False
    seed: int = attrs.field(default=0, validator=between(0, 2**63 - 1))
    max_new_bytes: int = attrs.field(default=256, validator=at_least(1))
    temperature: float = attrs.field(default=0.0, validator=at_least(0.0))
    top_k: int | None = attrs.field(default=None, validator=at_least(1))
    top_p: float | None = attrs.field(default=None, validator=[more_than(0.0), between(0.0, 1.0)])
    stop: tuple[str, ...] = attrs.field(default=(), validator=_no_empty_stop)

    @property
    def sampling(self) -> Sampling:
        """How ids are drawn from logits."""
        return Sampling(self.temperature, self.top_k, self.top_p)


@attrs.frozen
class IdSettings:
    """``[model.ids]``: see :class:`IdScheme`. A table without ``mask`` means: no [MASK] entry."""

    byte_offset: int = attrs.field(default=0, validator=at_least(0))
    bos: int = attrs.field(default=256, validator=at_least(0))
    eos: int = attrs.field(default=257, validator=at_least(0))
    mask: int | None = attrs.field(default=None, validator=at_least(0))
    size: int = attrs.field(default=259, validator=at_least(258))
    outputs_specials: bool = False

    def __attrs_post_init__(self) -> None:
        special = {"bos": self.bos, "eos": self.eos, "mask": self.mask}
        used = {range(self.byte_offset, self.byte_offset + 256): "the bytes"}
        for name, value in special.items():
            for other, owner in used.items():
                if value in other:
                    raise ValueError(f"{name} = {value} is taken by {owner}")
            if value is not None:
                used[range(value, value + 1)] = name
        if max(ids[-1] for ids in used) >= self.size:
            raise ValueError(f"size = {self.size} is too small for these ids")

    @property
    def scheme(self) -> IdScheme:
        """The scheme that these settings describe."""
        return IdScheme(**attrs.asdict(self))


@attrs.frozen
class ModelSettings:
    """``[model]``: what all model parts share. ``context_bytes``: the most bytes of one text."""

    context_bytes: int = attrs.field(validator=at_least(1))
    ids: IdSettings = attrs.field(factory=lambda: IdSettings(mask=258))

    @property
    def scheme(self) -> IdScheme:
        """The id scheme of the model."""
        return self.ids.scheme


#: Tables of settings that a config may have beside its components.
SETTINGS: Mapping[str, type] = {"run": RunSettings, "model": ModelSettings}


@attrs.frozen
class Config:
    """The tables of one configuration; each knows the file and path that it comes from.

    ``problems``: found while the config was put together; ``resolve`` raises them with its own.
    ``replaced``: top-level tables as they were before options changed them; ``resolve`` checks them
    too, so that no option hides what is wrong in a file.
    """

    tables: Table
    problems: tuple[Problem, ...] = ()
    replaced: tuple[Table, ...] = ()

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], place: str = "config") -> Config:
        """A config from tables in memory; ``place`` is how messages call it."""
        return cls(Table(mapping, Place(place)))

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint that the run names, if it names one."""
        run = self.tables.get("run")
        location = run.get("checkpoint") if isinstance(run, Mapping) else None
        return expand_home(location) if isinstance(location, str) and location else None

    def with_table(self, name: str, table: Mapping[str, Any]) -> Config:
        """A copy in which ``table`` stands for ``[name]``; a Table keeps its own place."""
        return attrs.evolve(self, tables=self.tables.updated({name: table}, {}))

    def with_option(self, name: str, table: Mapping[str, Any]) -> Config:
        """A copy in which the table that an option gives stands for ``[name]``."""
        return self._replacing(name, table, self.tables.get(name))

    def with_options(
        self,
        name: str,
        values: Mapping[str, object],
        options: Mapping[str, str] | None = None,
        *,
        without: Collection[str] = (),
    ) -> Config:
        """A copy with keys of ``[name]`` set by options, and those in ``without`` left out.

        options: how messages call a key, if not by its name (``--max-new-bytes``).
        """
        own = self.tables.get(name, Table({}, self.tables.place_of(name)))
        if not isinstance(own, Table):
            return self  # ``resolve`` will complain
        called = {key: "--" + key.replace("_", "-") for key in values} | dict(options or {})
        places = {key: Place(option) for key, option in called.items()}
        kept = Table({k: v for k, v in own.items() if k not in without}, own.place, own.moved)
        absent = values.keys() - own.keys()  # no fault of the file, for the options give them
        written = own.updated({k: values[k] for k in absent}, {k: places[k] for k in absent})
        return self._replacing(name, kept.updated(values, places), written)

    def with_run(self, **settings: object) -> Config:
        """A copy with settings of ``[run]`` set by options: None leaves one alone."""
        return self.with_options("run", {k: v for k, v in settings.items() if v is not None})

    def _replacing(self, name: str, table: Mapping[str, Any], written: object) -> Config:
        own = Table({name: written}, self.tables.place, self.tables.moved)
        replaced = (*self.replaced, own) if name in self.tables else self.replaced
        return attrs.evolve(self.with_table(name, table), replaced=replaced)


def load_config(path: str | Path) -> Config:
    """Read a TOML file; ConfigError if it is missing, unreadable or malformed."""
    return Config(read_toml(Path(path)))


def without_none(value: Any) -> Any:
    """The same tables and lists less the tables' None values, which TOML has no word for."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_none(item) for item in value]
    return value
