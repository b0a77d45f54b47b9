"""Does drafting pay in seconds at the 1B shape? Hypothetical acceptance, from a trained model.

    OMP_NUM_THREADS=2 python benchmarks/replayed_speed.py --folder DIR [--repeats 3] [--json FILE]

The weights are random (bfloat16, those of transformers_speed.py), so no draft would be right. What
drafts are right is taken from demo:python instead, on its held-out prompts at temperature 0.8,
where texts hardly repeat themselves, and so are the lengths of patches: see replaying.py. All
passes are run; their number is held against a closed form. Samplers take turns; what comes after
the first byte is timed. Repeats that FILE has already count too. --kernels, --scorer-dtype and
--compile are as in runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import cattrs
import torch
from replaying import (
    Acceptance,
    Replayed,
    ReplayedPatcher,
    ReplayedProposals,
    ReplayedVerification,
    Script,
    passes_of,
    refills_of,
)
from transformers_speed import prompt, write_model

from blt_core.component import BuildContext
from blt_core.pipeline import Pipeline
from blt_core.protocols import DecodeOps, Drafter
from blt_core.types import Draft, Draws, Passes, Rows, Sampling, matches
from blt_plugins.cost.bandwidth import Bandwidth, BandwidthParams
from blt_plugins.cost.calibration import Calibration, processor
from blt_plugins.cost.measuring import measure
from blt_plugins.cost.roofline import Roofline, RooflineParams
from blt_plugins.drafting.cascade import CascadeDrafter, CascadeParams
from blt_plugins.drafting.lookup import LookupDrafter, LookupParams
from blt_plugins.drafting.self import SelfDrafter, SelfParams
from blt_plugins.sampling.speculative import Speculative, SpeculativeParams
from blt_plugins.verification.replay import ReplayParams, ReplayVerification

MODEL = "demo:python"
PROMPTS = Path(__file__).parent / "prompts"
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 0, "samples": 3, "max_new_bytes": 200}
#: Ids that the known text goes on beyond what is timed: drafts reach so far.
BEYOND = 24
CASCADE = 16
C = BuildContext()


@attrs.frozen
class Behaviour:
    """What a trained model showed: how drafts and proposals went, and how long patches were."""

    drafts: dict[str, Acceptance]
    proposals: Acceptance
    patches: list[int]


class Watched:
    """A drafter whose inner proposals are held against the draft that came of them."""

    def __init__(self, cascade: CascadeDrafter) -> None:
        self.cascade, self._inner = cascade, cascade.drafter
        self._proposed: list[tuple[int, list[int]]] = []
        self.stood: list[tuple[int, int]] = []
        cascade.drafter = Noting(self._inner, self._proposed)

    def draft(
        self, ops: DecodeOps, limit: Sequence[int], sampling: Sampling, draws: Draws
    ) -> Draft:
        """As the cascade."""
        [begin] = ops.lengths
        self._proposed.clear()
        found = self.cascade.draft(ops, limit, sampling, draws)
        for at, ids in self._proposed:
            self.stood.append((len(ids), matches(ids, found.ids[0][at - begin :])))
        return found


@attrs.frozen
class Noting:
    """A drafter that notes what it proposes, and where."""

    inner: Drafter
    proposed: list[tuple[int, list[int]]]

    def draft(
        self, ops: DecodeOps, limit: Sequence[int], sampling: Sampling, draws: Draws
    ) -> Draft:
        """As the inner drafter, one text at a time."""
        [begin], found = ops.lengths, self.inner.draft(ops, limit, sampling, draws)
        self.proposed.append((begin, found.ids[0][: limit[0]]))
        return found


def drafters() -> dict[str, Drafter]:
    """The drafters that are timed, by the names of their samplers."""
    inner = LookupDrafter(LookupParams(draft_bytes=CASCADE - 1, min_bytes=1), C)
    return {
        "blt-s 8": SelfDrafter(SelfParams(draft_bytes=8), C),
        "blt-s 16": SelfDrafter(SelfParams(draft_bytes=16), C),
        "cascade 16": CascadeDrafter(CascadeParams(draft_bytes=CASCADE, drafter=inner), C),
        "lookup": LookupDrafter(LookupParams(), C),
    }


def verified(drafter: Drafter, verification: Any = None) -> Speculative:
    """The sampler of a drafter."""
    verification = verification or ReplayVerification(ReplayParams(), C)
    return Speculative(SpeculativeParams(drafter=drafter, verification=verification), C)


# -- the trained model ------------------------------


def behaviour() -> Behaviour:
    """Run the trained model's samplers on its held-out prompts."""
    pipeline = Pipeline.from_config({"schema": 1, "run": {"checkpoint": MODEL}})
    texts = [path.read_bytes() for path in sorted(PROMPTS.glob("*.txt"))]
    requests = pipeline.requests(texts, **SAMPLED)
    drafts: dict[str, Acceptance] = {}
    stood: list[tuple[int, int]] = []
    patches: list[int] = []
    for name, drafter in drafters().items():
        watched = Watched(drafter) if isinstance(drafter, CascadeDrafter) else drafter
        pipeline.sampler = verified(watched)
        pairs: list[tuple[int, int]] = []
        for request in requests:
            asked = {"temperature": 0.8, "seed": request.seed, "max_new_bytes": 200}
            for step in pipeline.steps(request.prompt, **asked):
                last = step
                left = request.max_new_bytes - step.progress[0].length
                if not step.round.prefill and left > CASCADE:  # the end cuts drafts short
                    pairs.append((step.round.drafted[0], step.round.accepted[0]))
            if name == "lookup":
                patches += patches_of(pipeline, request.prompt, last.progress[0].ids)
        drafts[name] = Acceptance.of(pairs)
        if isinstance(watched, Watched):
            stood = watched.stood
    return Behaviour(drafts, Acceptance.of(stood), patches)


@torch.inference_mode()
def patches_of(pipeline: Pipeline, before: bytes, new: Sequence[int]) -> list[int]:
    """Lengths of the patches of an output, but for those that it shares with its prompt."""
    scheme = pipeline.model.scheme
    ids = [scheme.bos, *scheme.encode(before), *new]
    flags = pipeline.model.patcher.flags(Rows(torch.tensor([ids]), (len(ids),)), None)[0].tolist()
    starts = [at + 1 for at, on in enumerate(flags) if on and at + 1 > len(ids) - len(new)]
    return [b - a for a, b in pairwise(starts)]


# -- the shape that is timed ------------------------------


@attrs.frozen
class Timed:
    """One run: seconds and bytes after the first byte, all passes, and those up to it."""

    seconds: float
    size: int
    passes: Passes
    first: Passes


def samplers(text: Sequence[int], shown: Behaviour) -> dict[str, tuple[Speculative, Replayed]]:
    """The samplers with replayed acceptance."""
    found = {}
    for name, drafter in drafters().items():
        script = Script(text, shown.drafts[name], free=name == "lookup")
        if isinstance(drafter, CascadeDrafter):
            drafter.drafter = ReplayedProposals(drafter.drafter, script, shown.proposals)
        replayed = Replayed(drafter, script)
        verification = ReplayedVerification(ReplayVerification(ReplayParams(), C), script)
        found[name] = (verified(replayed, verification), replayed)
    return found


def generate(pipeline: Pipeline, text: bytes, new: int) -> tuple[Timed, tuple[int, ...], int]:
    """Decode; also the ids, and how many rounds there were."""
    steps = pipeline.steps(text, max_new_bytes=new)
    first = last = next(steps)
    began = time.perf_counter()
    for step in steps:
        last = step
    seconds = time.perf_counter() - began
    [before], [after] = first.progress, last.progress
    timed = Timed(seconds, after.length - before.length, after.passes, before.passes)
    return timed, after.ids, after.rounds


def check(
    name: str, replayed: Replayed, timed: Timed, rounds: int, size: int, starts: set[int]
) -> None:
    """Hold the passes against their closed form."""
    drafts = replayed.drafts + [(0, 0)] * (rounds - len(replayed.drafts))
    if isinstance(replayed.inner, SelfDrafter):
        refills = [drafted for drafted, _ in drafts]
    elif isinstance(replayed.inner, CascadeDrafter):
        proposals: Any = replayed.inner.drafter
        by_round: dict[int, list[int]] = {}
        for begin, stood in proposals.stood:
            by_round.setdefault(begin, []).append(stood)
        at, refills = size + 1, []
        for drafted, stood in drafts:
            refills.append(refills_of(drafted, by_round.get(at, [])))
            at += stood + 1
    else:
        refills = [0] * len(drafts)
    want = passes_of(size, drafts, refills, starts)
    got = timed.passes.decoder, timed.passes.encoder
    if got != want:
        raise SystemExit(f"{name}: N_dec, N_enc are {got}; the closed form gives {want}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="of the weights; default: the demo's own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=96, help="bytes that are timed")
    parser.add_argument("--prompt", type=int, default=32, help="bytes of the prompt")
    parser.add_argument("--behaviour", type=Path, help="keep what the trained model showed here")
    parser.add_argument("--calibrate", action="store_true", help="also predict, by the roofline")
    parser.add_argument("--kernels", default="measured", help="measured, fixed, or a file")
    parser.add_argument("--scorer-dtype", default="float32", help="of the byte scorer")
    parser.add_argument("--compile", action="store_true", help="with compiled passes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.behaviour and options.behaviour.exists():
        shown = cattrs.structure(json.loads(options.behaviour.read_text()), Behaviour)
    else:
        shown = behaviour()
        if options.behaviour:
            options.behaviour.write_text(json.dumps(cattrs.unstructure(shown)))
    run: dict[str, Any] = {"checkpoint": MODEL}
    if options.folder:
        if not (options.folder / "config.json").exists():
            write_model(options.folder, "1b")
        run = {"checkpoint": str(options.folder), "dtype": "bfloat16"}
    run |= {"kernels": options.kernels, "scorer_dtype": options.scorer_dtype}
    run["compile"] = options.compile
    pipeline = Pipeline.from_config({"schema": 1, "run": run})
    for found in time_all(pipeline, shown, options):
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))
    print(table(found))


def time_all(
    pipeline: Pipeline, shown: Behaviour, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """All samplers in turn; the figures so far, after each repeat."""
    sizes = pipeline.parameter_counts
    text, size = prompt(options.prompt), options.prompt + 1
    patcher = ReplayedPatcher(
        pipeline.model.patcher, shown.patches, size + options.new + 2 * BEYOND
    )
    model = attrs.evolve(pipeline.model, patcher=patcher)
    plain = Pipeline(pipeline.plan, pipeline.plugins, model).with_sampler("ar")
    _, ids, _ = generate(plain, text, options.new + BEYOND)
    known = [model.scheme.bos, *model.scheme.encode(text), *ids]
    found: dict[str, Any] = {}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())
    rows: dict[str, Any] = found.setdefault("samplers", {})
    calibrations = found.setdefault("calibrations", [])
    if options.calibrate:
        calibrations.append(measure(pipeline, "1b", lambda: None).to_json())
    found |= {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": model.kernels or options.kernels,
        "scorer_dtype": options.scorer_dtype,
        "compile": options.compile,
        "new_bytes": options.new,
        "patch_bytes": [statistics.mean(shown.patches), statistics.pstdev(shown.patches)],
        "acceptance": {n: each.by_place for n, each in shown.drafts.items()},
    }
    for repeat in range(options.repeats):
        made: dict[str, Any] = {"ar": (None, None), **samplers(known, shown)}
        names = list(made)
        for place in range(len(names)):
            name = names[(place + repeat) % len(names)]
            sampler, replayed = made[name]
            each = plain if sampler is None else Pipeline(pipeline.plan, pipeline.plugins, model)
            each.sampler = sampler or each.sampler
            timed, ids, rounds = generate(each, text, options.new)
            if list(ids) != known[size : size + options.new]:
                raise SystemExit(f"{name} does not give ar's bytes")
            if replayed is not None:
                check(name, replayed, timed, rounds, size, patcher.starts)
            row = rows.setdefault(name, {"seconds": [], "bytes_per_second": []})
            row["seconds"].append(timed.seconds)
            row["bytes_per_second"].append(timed.size / timed.seconds)
            row["n_dec"], row["n_enc"] = timed.passes.decoder, timed.passes.encoder
            row["scorer"] = timed.passes.scorer
            row["gigabytes"] = price(timed.passes, sizes)
            read = 1e-9 * getattr(torch, options.scorer_dtype).itemsize * sizes.scorer
            row["with_scorer"] = row["gigabytes"] + read * timed.passes.scorer
            row["predicted"] = [
                predicted(each, timed.passes, sizes) - predicted(each, timed.first, sizes)
                for each in calibrations
            ]
            if replayed is not None:
                drafted, stood = (sum(column) for column in zip(*replayed.drafts, strict=True))
                row["accepted"] = [stood, drafted]
            print(f"{name} {timed.seconds:.2f} s", file=sys.stderr, flush=True)
        yield found


def price(passes: Passes, sizes: Any) -> float:
    """GB of weights."""
    return Bandwidth(BandwidthParams(), C).cost(passes, sizes).total


def predicted(found: dict[str, Any], passes: Passes, sizes: Any) -> float:
    """Seconds by the roofline."""
    model = Roofline(RooflineParams(), C)
    vars(model)["_calibrations"] = (cattrs.structure(found, Calibration),)
    return model.cost(passes, sizes).total


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    mean, spread = found["patch_bytes"]
    ar = found["samplers"]["ar"]
    base = statistics.median(ar["bytes_per_second"])
    lines = [
        f"hypothetical acceptance, from {MODEL}; patches of {mean:.2f} bytes (spread {spread:.2f})",
        f"{found['cpu']}, {found['threads']} threads, {found['new_bytes']} bytes",
        f"bytes/s, median of {len(ar['seconds'])} (min to max)",
    ]
    for name, row in found["samplers"].items():
        speeds = row["bytes_per_second"]
        speed = statistics.median(speeds)
        kept = "accepted {} of {}".format(*row["accepted"]) if "accepted" in row else ""
        lines.append(
            f"  {name:<12} {speed:7.2f} ({min(speeds):.2f} to {max(speeds):.2f})  "
            f"{speed / base:.2f} x ar   GB {ar['gigabytes'] / row['gigabytes']:.2f} x, "
            f"with the scorer {ar['with_scorer'] / row['with_scorer']:.2f} x   "
            f"N_dec {row['n_dec']} N_enc {row['n_enc']}  {kept}"
        )
        if row["predicted"]:
            told = statistics.median(row["predicted"])
            whole = statistics.median(ar["predicted"])
            lines[-1] += f"   roofline {told:.2f} s, {whole / told:.2f} x"
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
