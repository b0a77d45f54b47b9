"""How much memory a training config takes on each device, found without its weights or its text.

The parts are built on fake tensors, and one pass of each phase is traced through them; see
:mod:`blt_plugins.training.planning.tracing`. What lasts from step to step the training backend
tells.

Axes: b batch rows, r byte rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from blt_core.component import BuildContext
from blt_core.errors import ConfigError
from blt_core.model import Model, part_dtype
from blt_core.nn import RowTable
from blt_core.plugins.loading import Plugins
from blt_core.protocols import (
    MODEL_KINDS,
    MemoryPlanner,
    Objective,
    TrafficPlanner,
)
from blt_core.types import Rows, StateMemory
from blt_core.wiring.config import Config
from blt_core.wiring.resolve import Plan, build_node
from blt_plugins.training.backends.parameters import parameter_bytes
from blt_plugins.training.backends.torch import scorer_backend
from blt_plugins.training.data.windows import Batch
from blt_plugins.training.objectives.losses import MODEL, SCORER, ModelLoss, ScorerLoss
from blt_plugins.training.planning.patches import PlannedPatches
from blt_plugins.training.planning.tracing import Moment, trace_pass, trace_score
from blt_plugins.training.scores.held_out import evaluate_model, evaluate_scorer
from blt_plugins.training.setup.blocks import BLOCKS, block_sizes
from blt_plugins.training.setup.config import (
    TrainingPlan,
    check_passes,
    check_saves,
    check_trains,
    plan_training,
)
from blt_plugins.training.setup.scorer import trainable_scorer
from blt_plugins.training.setup.settings import TrainSettings

#: When the memory of a phase is at its peak: within a pass, as the optimizer steps, or while
#: held-out text is scored by weights that are gathered for it.
MOMENTS = PASS, STEP, SCORES = "a pass", "the optimizer's step", "held-out scores"

#: What windows are filled with; only a patcher without weights takes note of it.
_TEXT = b"the plan of a run is no run "


@attrs.frozen(kw_only=True)
class PhasePlan:
    """Memory of one phase, in bytes of each process.

    parameters: how many are trained. frozen: the other parts of the model, on the device. state:
    what the backend keeps, and how many passes run at once. pass_flops: floating-point operations
    of a pass's products, forward, backward and computed again; half_flops: of those in bfloat16.
    traffic: bytes that each process sends in a step; None where the backend does not tell.
    activations: the most that a pass holds beside gradients. peak: the most at any moment on the
    device; peak_in: which moment that is, one of ``MOMENTS``. passes: of a step in each process;
    rows, row_bytes: of the batch that was traced. steps, step_bytes: how many, and what all
    processes together read in one.
    """

    name: str
    parameters: int
    frozen: int
    state: StateMemory
    pass_flops: int
    half_flops: int
    traffic: int | None
    activations: int
    peak: int
    peak_in: str
    passes: int
    rows: int
    row_bytes: int
    steps: int
    step_bytes: int


@attrs.frozen(kw_only=True)
class MemoryPlan:
    """All phases of a config; one is over before the next begins.

    patch_bytes: the mean length of patches.
    """

    backend: str
    processes: int
    phases: tuple[PhasePlan, ...]
    patch_bytes: float

    @property
    def largest(self) -> PhasePlan:
        """The phase with the largest peak, which is that of the run."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def peak(self) -> int:
        """The most bytes on a device."""
        return self.largest.peak


class Planner:
    """Plans one config for any number of processes; what is traced once is kept.

    sizes: numbers of processes that are going to be asked for, which are checked before all else.
    note: told what is traced, and how far it is, where that takes long. Raises ConfigError for a
    config that does not train, for a backend that is no MemoryPlanner, and where passes cannot be
    dealt out to one of ``sizes``.
    """

    def __init__(
        self,
        config: Config,
        plugins: Plugins,
        sizes: Sequence[int] = (1,),
        note: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._note = note
        self._training = plan_training(config, plugins)
        check_passes(self._training.plan, self._training.settings, *sizes)
        self._node = self._training.plan.node("training_backend")
        backend = self._training.plan.build("training_backend")
        if not isinstance(backend, MemoryPlanner):
            text = f"{self._node.label} does not tell what it keeps in memory"
            raise ConfigError([self._node.place.written.problem(text)])
        check_saves(self._training.plan, self._training.settings, backend)
        scorer = scorer_backend(backend, self._training.plan.model.scheme)
        self._backends: dict[str, MemoryPlanner] = {SCORER: scorer, MODEL: backend}
        self._fakes = FakeTensorMode()
        self.model = _fake_model(self._training.plan, self._fakes)
        check_trains(self._training, self.model)
        self._traces: dict[tuple[str, torch.dtype | None], Trace] = {}
        self._scores: dict[tuple[str, torch.dtype | None], int] = {}

    def plan(self, processes: int = 1) -> MemoryPlan:
        """The plan; raises ConfigError where the passes cannot be dealt out to the processes."""
        settings = self._training.settings
        check_passes(self._training.plan, settings, processes)
        return MemoryPlan(
            backend=self._node.name,
            processes=processes,
            phases=tuple(
                self._plan(phase, processes) for phase in traced_phases(self.model, self._training)
            ),
            patch_bytes=settings.scorer.target_patch_bytes,
        )

    def _plan(self, phase: TracedPhase, processes: int) -> PhasePlan:
        passes = self._training.settings.accumulate // processes
        backend = self._backends[phase.name]
        state = backend.memory(phase.loss, processes=processes, accumulate=passes)
        if not self._training.settings.valid_bytes:  # nothing is gathered for scores
            state = attrs.evolve(state, device=attrs.evolve(state.device, scoring=0))
        trained = list(phase.loss.parameters())
        names = {id(parameter) for parameter in trained}
        others = (p for p in self.model.module_dict().parameters() if id(p) not in names)
        frozen = parameter_bytes(others)
        if self._training.settings.async_states:
            # A state holds both, and process 0 writes what is frozen.
            staging = state.device.parameters + state.device.optimizer + frozen
            state = attrs.evolve(state, host=attrs.evolve(state.host, staging=staging))
        trace = self._trace(phase, state.passes_in)
        peaks = _peaks(state, trace, passes) | {SCORES: self._scored(state, trace)}
        peak_in = max(peaks, key=lambda moment: peaks[moment])
        return PhasePlan(
            name=phase.name,
            parameters=sum(p.numel() for p in trained),
            frozen=frozen,
            state=state,
            pass_flops=trace.flops,
            half_flops=trace.half_flops,
            traffic=(
                backend.traffic(
                    phase.loss,
                    processes=processes,
                    accumulate=passes,
                    row_bytes=trace.row_bytes,
                )
                if isinstance(backend, TrafficPlanner)
                else None
            ),
            activations=max(moment.activations for moment in trace.moments),
            peak=frozen + peaks[peak_in],
            peak_in=peak_in,
            passes=passes,
            rows=len(trace.batch.rows.lengths),
            row_bytes=trace.batch.rows.ids_br.shape[1],
            steps=phase.steps,
            step_bytes=phase.step_bytes,
        )

    def _trace(self, phase: TracedPhase, dtype: torch.dtype | None) -> Trace:
        if (phase.name, dtype) not in self._traces:
            if dtype is not None:
                kinds = {name.partition(".")[0] for name, _ in phase.loss.named_parameters()}
                cast = _fake_model(self._training.plan, self._fakes, dtype, kinds)
                phase = next(p for p in traced_phases(cast, self._training) if p.name == phase.name)
            batch = full_batch(self.model, self._training.settings, phase.step_bytes)
            rng = torch.Generator().manual_seed(0)
            with _rows_read(phase.parts) as read:
                found = trace_pass(
                    lambda: phase.loss(batch, rng)[0],
                    phase.parts,
                    self._fakes,
                    self._told(f"a pass of the {phase.name}"),
                )
            rows = sum(read)
            self._traces[phase.name, dtype] = Trace(
                phase, batch, found.moments, found.flops, found.half_flops, rows
            )
        return self._traces[phase.name, dtype]

    def _scored(self, state: StateMemory, trace: Trace) -> int:
        """The most bytes while held-out text is scored, if weights are gathered for it; else 0.

        Its batches are as large as a pass, which keeps more where nothing is gathered.
        """
        if not state.device.scoring:
            return 0
        phase, key = trace.phase, (trace.phase.name, state.passes_in)
        if key not in self._scores:
            score = partial(phase.score, trace.batch)
            told = self._told(f"scores of the {phase.name}")
            self._scores[key] = trace_score(score, phase.parts, self._fakes, told)
        return state.device.scored + self._scores[key]

    def _told(self, what: str) -> Callable[[int], None]:
        def told(operations: int) -> None:
            self._note(f"tracing {what}: {operations:,} operations so far")

        return told


@attrs.frozen(eq=False)
class TracedPhase:
    """What is traced of a phase, ``loss`` and ``score`` of a batch; its steps, the bytes of one.

    parts: all of the model, trained in this phase or not.
    """

    name: str
    parts: nn.ModuleDict
    loss: nn.Module
    score: Callable[[Batch], object]
    steps: int
    step_bytes: int


@attrs.frozen(eq=False)
class Trace:
    """What one pass of a phase over ``batch`` holds, computes and reads in tables."""

    phase: TracedPhase
    batch: Batch
    moments: Sequence[Moment]
    flops: int
    half_flops: int
    row_bytes: int

    @property
    def gradients(self) -> int:
        """Bytes of all of them."""
        return parameter_bytes(self.phase.loss.parameters())


def _peaks(state: StateMemory, trace: Trace, passes: int) -> dict[str, int]:
    """The most bytes of the trained module within a pass, and in the optimizer's step.

    Gradients of earlier passes are there all the time; those of a single one come as activations
    go. So do those of each pass that runs beside others.
    """
    device, at_once = state.device, state.passes_at_once
    if passes > 1 and at_once == 1:
        held = device.total + max(moment.activations for moment in trace.moments)
    else:
        share = device.gradients / trace.gradients
        moving = max(m.activations + math.ceil(share * m.gradients) for m in trace.moments)
        summed = device.gradients if passes > at_once else 0
        held = device.total - device.gradients + summed + at_once * moving
    return {PASS: held, STEP: device.stepping}


# -- what is traced ------------------------------------------------------------------------------


@contextmanager
def _rows_read(parts: nn.Module) -> Iterator[list[int]]:
    """The bytes of the rows that calls of tables within it read, each call's."""
    read: list[int] = []

    def note(table: RowTable, given: tuple[Tensor, ...]) -> None:
        read.append(given[0].numel() * table.embedding_dim * table.weight.element_size())

    tables = [part for part in parts.modules() if isinstance(part, RowTable)]
    hooks = [table.register_forward_pre_hook(note) for table in tables]
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _fake_model(
    plan: Plan,
    fakes: FakeTensorMode,
    cast: torch.dtype | None = None,
    kinds: Collection[str] = (),
) -> Model:
    """The model, whose parameters hold no data; the parts of ``kinds`` in the dtype ``cast``."""
    dtype: torch.dtype = getattr(torch, plan.run.dtype)
    parts: dict[str, Any] = dict.fromkeys(MODEL_KINDS)  # a scorer alone has no others
    for kind in parts.keys() & plan.nodes.keys():
        own = cast if cast is not None and kind in kinds else part_dtype(kind, dtype)
        with fakes, _default_dtype(own):
            parts[kind] = plan.build(kind)
    return Model(**parts, scheme=plan.model.scheme, context_bytes=plan.model.context_bytes)


def traced_phases(model: Model, training: TrainingPlan) -> list[TracedPhase]:
    """The phases of a run, in order."""
    settings, own = training.settings, training.settings.scorer
    phases, scorer = [], trainable_scorer(model)
    if scorer is not None and own.steps:
        part = scorer.part
        phases.append(
            TracedPhase(
                SCORER,
                model.module_dict(),
                ScorerLoss(scorer),
                lambda batch: evaluate_scorer(part, [batch], model.scheme),
                own.steps,
                own.batch_bytes,
            )
        )
    if settings.steps:
        patches = PlannedPatches(model.patcher, own.target_patch_bytes)
        planned = attrs.evolve(model, patcher=patches)
        loss = ModelLoss(
            planned,
            _largest_blocks(training.plan),
            settings.precision,
            checkpointing=settings.gradient_checkpointing,
            score_after=settings.marker(model.scheme),
            label=training.plan.node("objective").entry.label,
        )
        phases.append(
            TracedPhase(
                MODEL,
                model.module_dict(),
                loss,
                lambda batch: evaluate_model(planned, [batch]),
                settings.steps,
                settings.batch_bytes,
            )
        )
    return phases


def _largest_blocks(plan: Plan) -> Objective:
    """The objective, which draws no sizes of blocks but the largest."""
    node = plan.node("objective")
    sizes = block_sizes(getattr(node.params, BLOCKS, None))
    if len(sizes) > 1:
        node = attrs.evolve(node, params=attrs.evolve(node.params, **{BLOCKS: sizes[-1]}))
    found: Objective = build_node(node, BuildContext(plan.model.scheme), plan.registry)
    return found


def full_batch(model: Model, settings: TrainSettings, step_bytes: int) -> Batch:
    """As many windows of the whole context as one pass takes, and at least one."""
    width = settings.context_bytes or model.context_bytes
    count = max(step_bytes // settings.accumulate // width, 1)
    scheme, text = model.scheme, torch.tensor(list(islice(cycle(_TEXT), width)))
    targets = (text + scheme.byte_offset).repeat(count, 1)
    ids = torch.cat((torch.full((count, 1), scheme.bos), targets[:, :-1]), 1)
    return Batch(Rows(ids, (width,) * count), targets, (width,) * count)
