"""The calibration of a model on this machine: medians of single passes, and the bare machine."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch

from blt_core.errors import RunError
from blt_core.model import Model
from blt_core.pipeline import Pipeline
from blt_core.types import Parameters
from blt_plugins.cost import probing
from blt_plugins.cost.calibration import PARTS, Calibration, Curve, Machine, PartTimes, size_of
from blt_plugins.cost.probing import Clock, Sample, Turn, prompt_passes, run

#: Sizes of the blocks that are measured.
BLOCKS = (4, 8, 16)
#: Bytes before the rows: few, and many; fewer where reading the few takes longer than SLOW seconds.
NEAR, FAR, FAR_IF_SLOW, SLOW = 64, 768, 160, 1.0


def measure(pipeline: Pipeline, source: str, watch: Callable[[], None]) -> Calibration:
    """The calibration of a pipeline's model, in its device and dtype. watch: called now and then.

    Raises RunError if a part is not called where it is watched.
    """
    model = pipeline.model
    lead = [Turn(rows) for rows in probing.WIDTHS]
    lead.insert(1, Turn(1, draft=True))
    far = [Turn(1), Turn(1, draft=True), Turn(9)]
    if model.decoder.denoises:
        lead += [Turn(1, block=size) for size in BLOCKS]
        far.append(Turn(1, block=BLOCKS[1]))
    most = min(FAR, model.context_bytes // 2)
    least = min(NEAR, most // 4)
    list(prompt_passes(pipeline, least, 1, watch))  # the first is slow in any process
    if pipeline.settings.compile:  # programs are compiled here, in passes that are not timed
        run(pipeline, least, lead, 0.0, watch)
        run(pipeline, min(most, FAR_IF_SLOW), far, 0.0, watch)
    near = run(pipeline, least, lead, probing.SECONDS, watch)
    slow = sum(each.seconds for _, each in near.prompt) > SLOW
    sizes = [] if slow else [least, (least + most) // 3, most]
    other = run(pipeline, min(most, FAR_IF_SLOW) if slow else most, far, probing.SECONDS / 2, watch)
    prompts = list(other.prompt)
    for size in sizes:
        prompts += prompt_passes(pipeline, size, probing.PROMPT_TURNS, watch)
    missing = [part for part in PARTS if part != "blocks" and not near.passes.get(part)]
    if missing:
        raise RunError(
            f"{source}: its {', '.join(missing)} cannot be timed: no pass goes through its methods"
        )
    parts = {
        part: part_times(
            near.passes.get(part, []),
            other.passes.get(part, []),
            [sample for name, sample in prompts if name == part],
            weight_bytes(model, part),
        )
        for part in PARTS
    }
    device, dtype = model.device, getattr(torch, pipeline.settings.dtype)
    total = sum(p.nbytes for p in model.module_dict().parameters())
    seen_bytes, seen_operations = best_rates(parts, pipeline.parameter_counts)
    return Calibration(
        machine=Machine.here(str(model.device), pipeline.settings.dtype, model.variant),
        source=source,
        parameters=pipeline.parameter_counts,
        bandwidth=max(read_bandwidth(device, total), seen_bytes),
        flops=max(product_rate(device, dtype), seen_operations),
        parts=parts,
        rounds=Curve(tuple((r, statistics.median(t)) for r, t in sorted(near.rounds.items()))),
        draft=statistics.median(near.drafts),
    )


def part_times(
    near: Sequence[Sample], far: Sequence[Sample], prompts: Sequence[Sample], weight_bytes: int
) -> PartTimes:
    """Medians by rows: what a pass takes with nothing before it, and for what stands there."""
    few, many, first = _medians(near), _medians(far), _medians(prompts)
    slopes = [
        (many[rows].seconds - few[rows].seconds) / (many[rows].context - few[rows].context)
        for rows in sorted(few.keys() & many.keys())
        if many[rows].context > few[rows].context
    ]
    # Passes of few rows tell best what is read beside the rows themselves. Of such a pass after a
    # short text that can be but a part; more is an accident of short passes.
    each = max(slopes[0], 0.0) if slopes else 0.0
    each = min([each, *(s.seconds / 2 / s.context for s in few.values() if s.context)])
    points = {rows: max(s.seconds - each * s.context, 0.0) for rows, s in few.items()}
    points |= {r: s.seconds for r, s in first.items() if r > max(points, default=0)}
    return PartTimes(Curve(tuple(sorted(points.items()))), each, weight_bytes)


def best_rates(parts: Mapping[str, PartTimes], sizes: Parameters) -> tuple[float, float]:
    """The most bytes, and operations, a second of any pass: no roofline may lie below a pass."""
    read = computed = 0.0
    for name, part in parts.items():
        for rows, seconds in part.alone.points:
            size = size_of(name, sizes)
            if seconds > 0:
                read = max(read, size * part.weight_bytes / seconds)
                computed = max(computed, 2 * size * rows / seconds)
    return read, computed


def _medians(samples: Sequence[Sample]) -> dict[int, Sample]:
    by_rows: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_rows[sample.rows].append(sample)
    return {
        rows: Sample(
            rows,
            round(statistics.median(each.context for each in found)),
            statistics.median(each.seconds for each in found),
        )
        for rows, found in by_rows.items()
    }


def weight_bytes(model: Model, part: str) -> int:
    """Bytes of a parameter of a part (its first one); 4 for a part without any."""
    name = {"blocks": "decoder", "scorer": "patcher"}.get(part, part)
    parts = model.module_dict()
    first = next(parts[name].parameters(), None) if name in parts else None
    return 4 if first is None else first.element_size()


# -- the machine ---------------------------------------------------------------------------------


def read_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second of a sum over as much memory as the model has, within bounds; the best."""
    data = torch.ones(min(max(size, 2**23), 2**29) // 4, device=device)
    return data.nbytes / _fastest(lambda: data.sum().item(), device)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of a product of large matrices; the best."""
    rows = torch.randn(512, 1024, device=device).to(dtype)
    weight = torch.randn(1024, 1024, device=device).to(dtype)
    seconds = _fastest(lambda: torch.nn.functional.linear(rows, weight), device)
    return 2 * len(rows) * weight.numel() / seconds


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    clock, times = Clock(device), []
    for _ in range(7):
        began = clock.now()
        work()
        times.append(clock.now() - began)
    return min(times)
