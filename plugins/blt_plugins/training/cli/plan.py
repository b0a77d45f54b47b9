"""``blt train --plan``: the memory plan of a config, for people and for machines."""

from __future__ import annotations

from typing import Any

import attrs
from rich.table import Table

from blt_core.cli.streams import console, output_json
from blt_core.plugins.loading import Plugins
from blt_core.wiring.config import Config
from blt_plugins.training.planning.plan import MemoryPlan, PhasePlan, Planner

GB = 1e9
#: Rows of the table that the backend's state has, on the device and on the host.
_STATE = ("parameters", "gradients", "optimizer", "buffers", "step", "scoring")


def tell_plan(config: Config, plugins: Plugins, *, processes: int, as_json: bool) -> None:
    """Print what training a config takes in each of ``processes``."""
    found = Planner(config, plugins).plan(processes)
    if as_json:
        output_json(plan_record(found))
    else:
        show_plan(found)


def plan_record(plan: MemoryPlan) -> dict[str, Any]:
    """The plan as JSON has it; memory is in bytes."""
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
            "passes": phase.passes,
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
        "phases": phases,
    }


def show_plan(plan: MemoryPlan) -> None:
    """Print the plan: one column a phase, two where some of it is on the host."""
    shown = console(100)
    shown.print(_table(plan))
    each = "one process" if plan.processes == 1 else f"each of {plan.processes} processes"
    shown.print(f"\nGB = 1e9 bytes in {each}; backend {plan.backend}")
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
