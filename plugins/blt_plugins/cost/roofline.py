"""The roofline cost model: seconds of the counted passes, from what this machine was measured."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

import attrs

from blt_core.component import BuildContext, Component, not_empty
from blt_core.errors import DataError
from blt_core.files import expand_home
from blt_core.types import Cost, Parameters, Passes, Shape
from blt_core.wiring.config import RunSettings
from blt_plugins.cost.calibration import PARTS, Calibration, Machine, read, size_of, stored

SECONDS = "s"


@attrs.frozen(kw_only=True)
class RooflineParams:
    """file: a calibration to price with (None: the one that is stored for this machine).

    dtype, device: of the calibration to look for (None: those of the run). Where nothing runs,
    passes are priced as they are run by default, if that was measured.
    """

    file: str | None = attrs.field(
        default=None,
        validator=attrs.validators.optional(not_empty()),
        converter=attrs.converters.optional(expand_home),
    )
    dtype: str | None = None
    device: str | None = None


class Roofline:
    """Seconds = Σ max(weights / bandwidth, operations / rate) + overhead(rows) + c · context.

    The sum runs over passes, each with its rows; overheads, the price c of a position in the cache,
    and what the engine takes for each pass, were measured by ``blt calibrate-cost`` on single
    passes of a model. A model of another size has that model's overheads. Passes without a shape
    are of one row.
    """

    def __init__(self, params: RooflineParams, context: BuildContext) -> None:
        self._file = params.file
        self._device = params.device or context.device or "cpu"
        self._dtype = params.dtype or context.dtype
        self._variant = context.variant

    def cost(self, passes: Passes, parameters: Parameters) -> Cost:
        """Total seconds and its lines. Raises DataError where this machine was not measured."""
        found = self.calibration(parameters)
        shapes = passes.shapes
        clean = passes.decoder - shapes.decoder.passes - shapes.blocks.passes
        others = {
            "decoder": clean,
            "encoder": passes.encoder_bytes - shapes.encoder.passes,
            "global_model": passes.encoder - shapes.global_model.passes,
            "scorer": passes.scorer - shapes.scorer.passes,
        }
        lines = {}
        for part in PARTS:
            shape: Shape = getattr(shapes, part)
            size = size_of(part, parameters)
            lines[part] = found.seconds(part, size, shape, others.get(part, 0))
        lines["engine"] = _engine(found, passes)
        if passes.draft_parameters or passes.draft:
            read_all = found.parts["decoder"].weight_bytes * passes.draft_parameters
            each = found.draft + found.overhead("decoder").at(1)
            lines["draft_model"] = read_all / found.bandwidth + each * passes.draft
        return Cost(sum(lines.values()), lines, unit=SECONDS)

    def calibration(self, parameters: Parameters) -> Calibration:
        """The calibration of a model of these sizes, or else of the one that is nearest to it."""
        return min(self._calibrations, key=lambda each: _distance(each.parameters, parameters))

    @cached_property
    def _calibrations(self) -> tuple[Calibration, ...]:
        if self._file is not None:
            return (read(Path(self._file)),)
        machine = Machine.here(self._device, self._dtype or "any dtype", self._variant or "")
        found = tuple(each for each in stored() if self._fits(each.machine, machine))
        if not found:
            raise DataError(
                f"roofline: no passes were measured on this machine ({machine})\n"
                f"  fix: blt calibrate-cost SOURCE --threads {machine.threads}, with a checkpoint "
                "or a config of that dtype and device, and kernels, compile and scorer_dtype as of "
                "the run; or set OMP_NUM_THREADS to what was measured"
            )
        usual = "" if RunSettings().kernels == "fixed" else "measured kernels"
        for variant in (usual, ""):
            if plain := tuple(each for each in found if each.machine.variant == variant):
                return plain
        return found

    def _fits(self, stored: Machine, here: Machine) -> bool:
        same = attrs.evolve(stored, dtype=here.dtype, variant=here.variant) == here
        of_run = ((self._dtype, stored.dtype), (self._variant, stored.variant))
        return same and all(asked in (None, found) for asked, found in of_run)


def _engine(found: Calibration, passes: Passes) -> float:
    """Bookkeeping and the choice of ids: of each decoder pass, and of true ones what these add."""
    shape = passes.shapes.scorer
    widths = (*shape.widths, (1, max(passes.scorer - shape.passes, 0)))
    true = sum(n * max(found.rounds.at(rows) - found.draft, 0.0) for rows, n in widths)
    return found.draft * passes.decoder + true


def _distance(one: Parameters, other: Parameters) -> float:
    """How far two models' sizes are apart: 0 for the same."""
    pairs = zip(attrs.astuple(one), attrs.astuple(other), strict=True)
    return sum(abs(math.log1p(a) - math.log1p(b)) for a, b in pairs)


ROOFLINE = Component(
    kind="cost_model",
    name="roofline",
    factory=Roofline,
    params=RooflineParams,
    summary="seconds on this machine, from its bandwidth, its arithmetic, and overheads measured",
)
