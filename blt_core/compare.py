"""Samplers side by side on the same prompts: passes, cost, speed, and whether the bytes agree.

Where two outputs that should agree differ, the difference is explained: floating-point sums of
different shapes can part at a near-tie of two logits, or of an entropy and the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn

from blt_core.decoding.engine import Request
from blt_core.errors import RequestError
from blt_core.model import Model, part_dtype
from blt_core.pipeline import Generation, Pipeline
from blt_core.requests import (
    RequestSettings,
    TextLike,
    read_requests,
    shows_settings,
    to_bytes,
)
from blt_core.types import (
    GIGABYTES,
    Draws,
    Parameters,
    Passes,
    RoundCounts,
    Rows,
    Sampling,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

GREEDY = Sampling()
#: Margins below which runs of different shapes may part, by the dtype of a model's weights.
NEAR_TIE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.25}


@attrs.frozen
class Difference:
    """Where an output leaves the reference's, and how close the call was there.

    first_difference: index of the first differing new id. logit_margin: how close the choice of
    that id was, see :meth:`blt_core.types.Sampling.margin`: greedy, the gap between the two
    highest logits. flag_margin: smallest distance of a new byte's entropy from the
    patcher's threshold up to there, in nats (None for patchers without one). near_tie: whether
    either margin is below NEAR_TIE, of the dtype of what was computed.
    """

    first_difference: int
    logit_margin: float
    flag_margin: float | None
    near_tie: bool


@attrs.frozen
class Row:
    """One sampler's totals over the prompts.

    title: what the row is called. spec: the sampler as given. name: its label, if it has one, or
    the sampler's name.

    cost: by the config's cost model, in cost_unit. relative_cost, relative_speed: ratios to the
    first sampler's, None where that is 0.

    agreement: share of the first sampler's ids that stand at the same places here. repeats: share
    of the runs of REPEAT_BYTES bytes that stood in the same output before, which makes drafting
    easy. differences: one for each prompt whose output differs. in_law: whether the output equals
    the reference's in distribution alone, where bytes are not compared. results: of each prompt.
    """

    title: str
    spec: str
    name: str
    settings: dict[str, Any]
    passes: Passes
    rounds: int
    drafted: int
    accepted: int
    counts: RoundCounts
    cost: float
    cost_unit: str
    relative_cost: float | None
    bytes_per_second: float
    relative_speed: float | None
    agreement: float
    repeats: float
    differences: tuple[Difference, ...]
    in_law: bool
    results: tuple[Generation, ...]

    @property
    def identical(self) -> bool | None:
        """Whether all outputs equal the reference's; None where they do in distribution alone."""
        return None if self.in_law else not self.differences

    @property
    def gigabytes(self) -> float | None:
        """The cost, where it is weight traffic; None in another unit."""
        return self.cost if self.cost_unit == GIGABYTES else None

    @property
    def relative_gigabytes(self) -> float | None:
        """The relative cost, where it is one of weight traffic."""
        return self.relative_cost if self.cost_unit == GIGABYTES else None

    @property
    def near_ties(self) -> int:
        """How many of the differences are near-ties."""
        return sum(d.near_tie for d in self.differences)


@shows_settings
def compare(
    pipeline: Pipeline,
    samplers: Mapping[str, str | Mapping[str, Any]],
    prompts: TextLike | Sequence[TextLike],
    *,
    parameters: Parameters | None = None,
    progress: Callable[[str, int], None] = lambda _name, _index: None,
    **request: Unpack[RequestSettings],
) -> list[Row]:
    """Run every sampler on every prompt, one at a time, and sum up.

    samplers: what rows are called, and an inline spec (``"blt-s draft_bytes=8"``) or a table of
    each; the first is the reference. Prompts go round the samplers, so that a drift of the
    machine's speed meets all alike, after a short run of each that is not counted. parameters:
    counts that price the passes (default: the model's own). request: as for ``generate``. All is
    checked before any work. progress(name, prompt index) is called before each run.
    """
    requests, sampling = read_requests(prompts, request, pipeline.settings)
    pipelines = {name: pipeline.with_sampler(spec) for name, spec in samplers.items()}
    for each in pipelines.values():
        each.check(prompts, **request)
    most = request.get("max_new_bytes") or pipeline.settings.max_new_bytes
    first: RequestSettings = {**request, "seed": requests[0].seed, "samples": None}
    short: RequestSettings = {**first, "max_new_bytes": min(most, WARM_UP_BYTES)}
    for each in pipelines.values():
        each.generate(requests[0].prompt, **short)
    results: dict[str, list[Generation]] = {name: [] for name in pipelines}
    for index, one in enumerate(requests):
        alone: RequestSettings = {**request, "seed": one.seed, "samples": None}
        for name, each in pipelines.items():
            progress(name, index)
            results[name].append(each.generate(one.prompt, **alone))
    rows: list[Row] = []
    reference_in_law = _in_law(next(iter(pipelines.values())))
    for name, each in pipelines.items():
        named = _names(name, samplers[name])
        row = _row(named, each, results[name], parameters, rows[0] if rows else None)
        if rows and not sampling.greedy and (_in_law(each) or reference_in_law):
            row = attrs.evolve(row, in_law=True)
        elif rows:
            differences = _differences(pipeline.model, requests, sampling, row, rows[0])
            row = attrs.evolve(row, differences=differences)
        rows.append(row)
    return rows


#: Length of the runs whose repetition is counted.
REPEAT_BYTES = 16


def repeats(texts: Iterable[bytes], size: int = REPEAT_BYTES) -> float:
    """Share of the runs of ``size`` bytes in the texts that stood in the same text before."""
    distinct = total = 0
    for text in texts:
        count = max(len(text) - size + 1, 0)
        distinct += len({text[i : i + size] for i in range(count)})
        total += count
    return 1 - distinct / total if total else 0.0


def _in_law(pipeline: Pipeline) -> bool:
    return bool(getattr(pipeline.sampler, "in_law", False))


#: New bytes of the run of each sampler that is not counted.
WARM_UP_BYTES = 16


def _names(title: str, spec: str | Mapping[str, Any]) -> tuple[str, str, str]:
    """Title, spec and name of a row: a title that is not the spec itself is a label."""
    if isinstance(spec, str) and spec != title:
        return title, spec, title
    return title, title, title.split(maxsplit=1)[0]


def _row(
    named: tuple[str, str, str],
    pipeline: Pipeline,
    results: Sequence[Generation],
    parameters: Parameters | None,
    reference: Row | None,
) -> Row:
    passes = sum((result.passes for result in results), Passes())
    cost = pipeline.price(passes, parameters)
    speed = _speed(results)
    title, spec, name = named
    return Row(
        title=title,
        spec=spec,
        name=name,
        settings=pipeline.plan.node("sampler").describe(),
        passes=passes,
        rounds=sum(result.rounds for result in results),
        drafted=sum(result.drafted for result in results),
        accepted=sum(result.accepted for result in results),
        counts=sum((result.counts for result in results), RoundCounts()),
        cost=cost.total,
        cost_unit=cost.unit,
        relative_cost=_ratio(cost.total, reference.cost) if reference else 1.0,
        bytes_per_second=speed,
        relative_speed=_ratio(speed, reference.bytes_per_second) if reference else 1.0,
        agreement=_agreement(results, reference.results if reference else results),
        repeats=repeats([result.output for result in results]),
        differences=(),
        in_law=False,
        results=tuple(results),
    )


def _ratio(value: float, reference: float) -> float | None:
    return value / reference if reference else None


def _speed(results: Sequence[Generation]) -> float:
    seconds = sum(result.seconds for result in results)
    later = sum(result.bytes_per_second * result.seconds for result in results)
    return later / seconds if seconds > 0 else 0.0


def _agreement(results: Sequence[Generation], expected: Sequence[Generation]) -> float:
    pairs = [(r.ids, e.ids) for r, e in zip(results, expected, strict=True)]
    same = sum(a == b for got, want in pairs for a, b in zip(got, want, strict=False))
    return same / max(sum(len(want) for _, want in pairs), 1)


def _differences(
    model: Model, requests: Sequence[Request], sampling: Sampling, row: Row, reference: Row
) -> tuple[Difference, ...]:
    triples = zip(requests, row.results, reference.results, strict=True)
    return tuple(
        explain(model, want.prompt, want.ids, got.ids, sampling, request.seed)
        for request, got, want in triples
        if got.ids != want.ids
    )


@torch.inference_mode()
def explain(
    model: Model,
    prompt: TextLike,
    expected: Sequence[int],
    found: Sequence[int],
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> Difference:
    """Where ids ``found`` leave those ``expected``, both continuing ``prompt``; margins there.

    ``sampling`` and ``seed`` are those that both were drawn with.
    """
    pairs = zip(expected, found, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    ids = [model.scheme.bos, *model.scheme.encode(to_bytes(prompt, "prompt")), *expected[:shared]]
    rows = Rows(torch.tensor([ids], device=model.device), (len(ids),))
    output = model.forward(rows, model.patcher.flags(rows, None)).clean
    if output is None:
        raise RequestError("the decoder returned no output for its clean rows")
    logits = output.logits[0, -1].cpu().double()
    logits[list(model.scheme.never_output)] = float("-inf")
    margin = sampling.margin(logits, Draws((seed,)), len(ids))
    dtype = output.logits.dtype
    flag = _flag_margin(model, rows, len(ids) - shared)
    flag_bound = NEAR_TIE[_flag_dtype(model, dtype)]
    tie = margin < NEAR_TIE[dtype] or (flag is not None and flag < flag_bound)
    return Difference(shared, margin, flag, tie)


def _flag_dtype(model: Model, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a model of ``dtype`` computes flags in."""
    part = model.patcher
    own = [each.dtype for each in part.parameters()] if isinstance(part, nn.Module) else []
    return own[0] if own else part_dtype("patcher", dtype)


def _flag_margin(model: Model, rows: Rows, begin: int) -> float | None:
    """How close a flag of the bytes from ``begin`` on came to being another."""
    margins = getattr(model.patcher, "margins", None)
    if margins is None:
        return None
    return float(margins(rows)[0, begin - 1 :].min())
