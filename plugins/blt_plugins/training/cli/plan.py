"""``blt train --plan``: the memory plan of a config, for people and for machines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import attrs
import typer
from rich.table import Table

from blt_core.cli.streams import console, output_json
from blt_core.plugins.loading import Plugins
from blt_core.wiring.config import Config
from blt_plugins.training.planning.devices import Device, parse_device
from blt_plugins.training.planning.estimate import estimate
from blt_plugins.training.planning.plan import MemoryPlan, PhasePlan, Planner

GB, TERA, DAY = 1e9, 1e12, 24 * 3600
#: Rows of the table that the backend's state has, on the device and on the host.
_STATE = ("parameters", "gradients", "optimizer", "buffers", "step", "scoring", "staging")


def tell_plan(
    config: Config,
    plugins: Plugins,
    sizes: Sequence[int],
    device_type: str | None,
    *,
    as_json: bool,
) -> None:
    """Print what training a config takes in each of so many processes, for each of ``sizes``.

    device_type: the devices whose steps are estimated (None: of none); see ``parse_device``.
    """
    device = None if device_type is None else parse_device(device_type)
    planner = Planner(config, plugins, sizes, partial(typer.echo, err=True))
    plans = [planner.plan(size) for size in sizes]
    if as_json:
        records = [plan_record(plan, device) for plan in plans]
        output_json(records[0] if len(records) == 1 else {"plans": records})
        return
    if len(plans) == 1:
        show_plan(plans[0])
    if len(plans) > 1 or device is not None:
        show_sizes(plans, device)


def plan_record(plan: MemoryPlan, device: tuple[str, Device] | None = None) -> dict[str, Any]:
    """The plan as JSON has it; memory and traffic in bytes, times in seconds."""
    phases = {
        phase.name: {
            "trained_parameters": phase.parameters,
            "device": {
                **attrs.asdict(phase.state.device),
                "frozen": phase.frozen,
                "activations": phase.activations,
                "peak": phase.peak,
            },
            "host": attrs.asdict(phase.state.host),
            "peak_in": phase.peak_in,
            "passes": phase.passes,
            "pass_flops": phase.pass_flops,
            "half_flops": phase.half_flops,
            "traffic": phase.traffic,
            **({} if device is None else {"estimate": _estimate_record(phase, plan, device)}),
            "passes_at_once": phase.state.passes_at_once,
            "pass_rows": phase.rows,
            "row_bytes": phase.row_bytes,
            "step_bytes": phase.step_bytes,
            "step_patches": round(phase.step_bytes / plan.patch_bytes),
            "steps": phase.steps,
            "total_bytes": phase.step_bytes * phase.steps,
        }
        for phase in plan.phases
    }
    return {
        "backend": plan.backend,
        "world_size": plan.processes,
        "peak": plan.peak,
        "peak_phase": plan.largest.name,
        "phases": phases,
    }


def _estimate_record(
    phase: PhasePlan, plan: MemoryPlan, device: tuple[str, Device]
) -> dict[str, Any] | None:
    found = estimate(phase, plan.processes, device[1])
    if found is None:
        return None
    return {
        "device_type": device[0],
        "device": attrs.asdict(device[1]),
        "fits": found.fits,
        "compute": found.compute,
        "communication": found.communication,
        "step": [found.fastest, found.slowest],
        "efficiency": list(found.efficiency),
        "run": [phase.steps * found.fastest, phase.steps * found.slowest],
    }


def show_sizes(plans: Sequence[MemoryPlan], device: tuple[str, Device] | None) -> None:
    """Print a row for each number of processes and phase."""
    table = Table(box=None, header_style="bold")
    names = ["processes", "phase", "peak, GB", "in", "passes", "sent, GB"]
    names += ["passes, s", "sending, s", "step, s", "efficiency", "days"] if device else []
    for name in names:
        justify: Literal["left", "right"] = "left" if name in {"phase", "in"} else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for plan in plans:
        for phase in plan.phases:
            sent = "?" if phase.traffic is None else _gigabytes(phase.traffic)
            fits = device is None or phase.peak <= device[1].memory
            peak = _gigabytes(phase.peak) + ("" if fits else " *")
            cells = [str(plan.processes), phase.name, peak, phase.peak_in, str(phase.passes)]
            table.add_row(*cells, sent, *(_estimated(phase, plan, device[1]) if device else []))
    shown = console(160)
    shown.print()
    shown.print(table)
    for plan in plans:
        shown.print(f"{_of_each(plan)}: {_largest(plan)}", soft_wrap=True)
    if device:
        name, numbers = device
        shown.print(
            f"\nEstimates for {name}: {numbers.memory / GB:,.0f} GB; products at "
            f"{numbers.utilisation:.0%} of {numbers.flops / TERA:,.0f} TFLOP/s in bfloat16, "
            f"{numbers.float32_flops / TERA:,.0f} in float32; each device sends "
            f"{numbers.link / GB:,.0f} GB/s within a node of {numbers.node}, "
            f"{numbers.network / GB:,.0f} GB/s beyond. The first time of a step is with all "
            "sending hidden behind passes, the second with none. *: more than fits.",
            soft_wrap=True,
        )


def _estimated(phase: PhasePlan, plan: MemoryPlan, device: Device) -> list[str]:
    found = estimate(phase, plan.processes, device)
    if found is None:
        return ["?"] * 5
    days = [phase.steps * seconds / DAY for seconds in (found.fastest, found.slowest)]
    return [
        f"{found.compute:.3g}",
        f"{found.communication:.3g}",
        _span(f"{found.fastest:.3g}", f"{found.slowest:.3g}"),
        _span(*(f"{share:.0%}" for share in found.efficiency)),
        _span(*(f"{each:.3g}" for each in days)),
    ]


def _span(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def show_plan(plan: MemoryPlan) -> None:
    """Print the plan: one column a phase, two where some of it is on the host."""
    shown = console(100)
    shown.print(_table(plan))
    shown.print(f"\nGB = 1e9 bytes in {_of_each(plan)}; backend {plan.backend}")
    shown.print(_largest(plan), soft_wrap=True)
    for phase in plan.phases:
        patches = round(phase.step_bytes / plan.patch_bytes)
        at_once = phase.state.passes_at_once
        paired = f"{at_once} at once, " if at_once > 1 else ""
        shown.print(
            f"{phase.name}: {phase.parameters:,} trained parameters; {phase.steps:,} steps of "
            f"{phase.step_bytes:,} bytes (about {patches:,} patches), "
            f"{phase.steps * phase.step_bytes / GB:,.3f} GB in all; each process makes "
            f"{phase.passes} of a step's passes, {paired}{phase.rows} x {phase.row_bytes:,} bytes "
            "each",
            soft_wrap=True,
        )


def _of_each(plan: MemoryPlan) -> str:
    return "one process" if plan.processes == 1 else f"each of {plan.processes} processes"


def _largest(plan: MemoryPlan) -> str:
    """What the run takes, and when."""
    phase = plan.largest
    size = _gigabytes(phase.peak)
    return f"the run takes {size} GB, in the phase of the {phase.name}, in {phase.peak_in}"


def _table(plan: MemoryPlan) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column()
    hosted = [phase for phase in plan.phases if phase.state.host.total]
    for phase in plan.phases:
        table.add_column(f"{phase.name}, GB", justify="right")
        if phase in hosted:
            table.add_column("on the host", justify="right")
    for name in (*_STATE, "frozen", "activations", "peak"):
        cells = [cell for phase in plan.phases for cell in _cells(phase, name, phase in hosted)]
        style = "bold" if name == "peak" else None
        table.add_row(name, *cells, style=style)
    return table


def _cells(phase: PhasePlan, name: str, hosted: bool) -> list[str]:  # noqa: FBT001
    if name in _STATE:
        device, host = (getattr(s, name) for s in (phase.state.device, phase.state.host))
    else:
        device, host = getattr(phase, name), phase.state.host.stepping if name == "peak" else 0
    return [_gigabytes(device), *([_gigabytes(host)] if hosted else [])]


def _gigabytes(size: int) -> str:
    return f"{size / GB:,.3f}" if size else "-"
