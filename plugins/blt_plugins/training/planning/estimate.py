"""How long a step would take on devices that are not here: an estimate from a few numbers.

Products and what is sent are counted exactly, by a traced pass and by the backend's formulas. How
much of a device's speed passes reach is not known; nor is how much of the sending is hidden behind
them, so there are two times of a step: with all of it hidden, and with none.
"""

from __future__ import annotations

import attrs

from blt_plugins.training.planning.devices import Device
from blt_plugins.training.planning.plan import PhasePlan


@attrs.frozen(kw_only=True)
class Estimate:
    """Of one phase on so many devices; seconds of a step.

    compute: its passes. communication: sending what is sent, at the slower of the two speeds that
    the number of devices brings in. traffic: bytes that each device sends. fits: whether the peak
    fits into the memory of one.
    """

    compute: float
    communication: float
    traffic: int
    fits: bool

    @property
    def fastest(self) -> float:
        """A step whose sending is hidden behind its passes."""
        return max(self.compute, self.communication)

    @property
    def slowest(self) -> float:
        """A step that sends and computes in turn."""
        return self.compute + self.communication

    @property
    def efficiency(self) -> tuple[float, float]:
        """The share of a step that is spent in passes, at least and at most."""
        return self.compute / self.slowest, self.compute / self.fastest


def estimate(phase: PhasePlan, processes: int, device: Device) -> Estimate | None:
    """The estimate for a phase that was planned for so many ``processes``.

    None where the backend does not tell what it sends.
    """
    if phase.traffic is None:
        return None
    whole = phase.pass_flops - phase.half_flops
    seconds = phase.half_flops / device.flops + whole / device.float32_flops
    speed = device.link if processes <= device.node else device.network
    return Estimate(
        compute=phase.passes * seconds / device.utilisation,
        communication=phase.traffic / speed,
        traffic=phase.traffic,
        fits=phase.peak <= device.memory,
    )
