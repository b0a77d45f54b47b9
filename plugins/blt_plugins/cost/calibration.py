"""What ``blt calibrate-cost`` measured on a machine, and where it is kept.

One JSON file a machine and model, in the user's cache folder. Times are in seconds.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import cattrs

from blt_core.errors import DataError, RunError
from blt_core.files import read_json
from blt_core.log import logger
from blt_core.storage.folders import file_errors, replace_file
from blt_core.storage.user_cache import cache_folder
from blt_core.types import Parameters, Shape

FORMAT = 1
_CONVERTER = cattrs.Converter(detailed_validation=False)
#: The parts that passes are measured of, as :class:`blt_core.types.Shapes` names them.
PARTS = ("decoder", "blocks", "encoder", "global_model", "scorer")


@attrs.frozen
class Machine:
    """What measured times depend on.

    device: ``cpu``, or the name of the accelerator. variant: as of ``Model.variant``.
    """

    cpu: str
    threads: int
    torch: str
    device: str
    dtype: str
    variant: str = ""

    @classmethod
    def here(cls, device: str, dtype: str, variant: str = "") -> Machine:
        """This machine, as this process uses it."""
        import torch

        name = device
        if device.startswith("cuda") and torch.cuda.is_available():
            name = torch.cuda.get_device_name(torch.device(device))
        return cls(processor(), torch.get_num_threads(), torch.__version__, name, dtype, variant)

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        told = (self.cpu, threads, f"torch {self.torch}", self.device, self.dtype, self.variant)
        return ", ".join(filter(None, told))


@attrs.frozen
class Curve:
    """Seconds against rows, as (rows, seconds) in ascending order: straight between these points.

    Beyond the last it goes on as between the last two, but never falls; before the first it is
    level. Without points it is 0.
    """

    points: tuple[tuple[int, float], ...] = ()

    def at(self, rows: float) -> float:
        """Seconds for so many rows."""
        if not self.points:
            return 0.0
        at = bisect_left(self.points, (rows, -math.inf))
        if at == 0:
            return self.points[0][1]
        if at == len(self.points):
            if at == 1:
                return self.points[0][1]
            at -= 1
            (r0, t0), (r1, t1) = self.points[at - 1 : at + 1]
            return t1 + max(t1 - t0, 0.0) / (r1 - r0) * (rows - r1)
        (r0, t0), (r1, t1) = self.points[at - 1 : at + 1]
        return t0 + (t1 - t0) / (r1 - r0) * (rows - r0)


@attrs.frozen
class PartTimes:
    """Passes of one part. alone: seconds by rows, with nothing before them in the cache.

    context: seconds more a pass for each position before its rows. weight_bytes: of a parameter.
    """

    alone: Curve = Curve()
    context: float = 0.0
    weight_bytes: int = 4


@attrs.frozen
class Calibration:
    """Times of single passes of a model on a machine.

    source: what was measured. bandwidth: bytes that a plain read gives a second. flops: floating
    point operations a second of a large product. parts: by the names in PARTS. rounds: what the
    engine and the choice of ids take beside the parts in a true pass, by its rows; draft: in a pass
    that drafts.
    """

    machine: Machine
    source: str
    parameters: Parameters
    bandwidth: float
    flops: float
    parts: Mapping[str, PartTimes]
    rounds: Curve
    draft: float

    def __attrs_post_init__(self) -> None:
        figures = [self.bandwidth, self.flops, self.draft, *(t for _, t in self.rounds.points)]
        for part in self.parts.values():
            figures += [part.context, *(seconds for _, seconds in part.alone.points)]
        figures += attrs.astuple(self.parameters)
        if not all(0 <= figure < math.inf for figure in figures):
            raise ValueError("its figures are not all finite, and 0 or more")
        least = min(self.bandwidth, self.flops, *(p.weight_bytes for p in self.parts.values()))
        if least < 1:
            raise ValueError("its rates and bytes of a weight are not all finite, and 1 or more")
        if set(self.parts) != set(PARTS):
            raise ValueError(f"its parts are {', '.join(self.parts)}, not {', '.join(PARTS)}")
        for curve in (self.rounds, *(part.alone for part in self.parts.values())):
            if not all(r0 < r1 for (r0, _), (r1, _) in pairwise(((0, 0.0), *curve.points))):
                raise ValueError("rows of its curves do not ascend from 1 on")

    def floor(self, part: str, size: int, rows: float) -> float:
        """The roofline: a pass takes no less than its weights' read, nor than its arithmetic."""
        read = size * self._times(part).weight_bytes / self.bandwidth
        return max(read, 2 * size * rows / self.flops)

    def overhead(self, part: str) -> Curve:
        """What a pass of this model's part took beyond its roofline, by rows."""
        size = size_of(part, self.parameters)
        points = self._times(part).alone.points
        return Curve(tuple((r, max(t - self.floor(part, size, r), 0.0)) for r, t in points))

    def _times(self, part: str) -> PartTimes:
        """Of a part; blocks that the measured decoder cannot fill are as its clean rows."""
        lacks = part == "blocks" and not self.parts[part].alone.points
        return self.parts["decoder" if lacks else part]

    def seconds(self, part: str, size: int, shape: Shape, others: int = 0) -> float:
        """Passes of a part of ``size`` parameters; ``others``: passes of one row besides."""
        beyond = self.overhead(part)
        widths = (*shape.widths, (1, max(others, 0)))
        passes = sum(n * (self.floor(part, size, r) + beyond.at(r)) for r, n in widths if n)
        return passes + self._times(part).context * shape.context

    def to_json(self) -> dict[str, Any]:
        """As it is kept in a file."""
        return {"format": FORMAT, **cattrs.unstructure(self)}


def size_of(part: str, parameters: Parameters) -> int:
    """How many parameters a pass of a part reads."""
    return int(getattr(parameters, "decoder" if part == "blocks" else part))


def processor() -> str:
    """The CPU's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


# -- files ---------------------------------------------------------------------------------------


def folder() -> Path:
    """Where calibrations of this user's machines are kept."""
    return cache_folder() / "roofline"


def save(found: Calibration, path: Path | None = None) -> Path:
    """Keep a calibration, in the place of an earlier one of the same machine and model.

    path: where else than in the user's cache. RunError where it cannot be written.
    """
    if path is None:
        machine = attrs.asdict(found.machine)
        if not found.machine.variant:
            del machine["variant"]  # what was kept before there were variants has no other name
        key = [machine, attrs.asdict(found.parameters)]
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path = folder() / f"{name[:16]}.json"
    with file_errors(path, RunError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replace_file(path) as file:
            file.write(json.dumps(found.to_json(), indent=1).encode() + b"\n")
    return path


def read(path: Path) -> Calibration:
    """The calibration in a file; DataError, which names it, for what is none."""
    fix = "fix: make it again with blt calibrate-cost"
    try:
        tables = read_json(path)
        if not isinstance(tables, dict) or tables.get("format") != FORMAT:
            raise DataError(f"{path}: no calibration of format {FORMAT}\n  {fix}")
        return _CONVERTER.structure(tables, Calibration)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}\n  {fix}") from error
    except KeyError as error:
        raise DataError(f"{path}: not read as a calibration: no key {error}\n  {fix}") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: not read as a calibration: {error}\n  {fix}") from error


def stored() -> Iterator[Calibration]:
    """All calibrations that are kept, in the order of their files' names; warns of other files."""
    return filter(None, map(_read_if_it_is_one, sorted(folder().glob("*.json"))))


def _read_if_it_is_one(path: Path) -> Calibration | None:
    try:
        return read(path)
    except DataError as error:
        logger().warning(f"roofline: passed over: {error}")
        return None
