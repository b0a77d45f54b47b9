"""Predicted against measured seconds: the cost model ``roofline``, ten samplers, two shapes.

    OMP_NUM_THREADS=1 python benchmarks/roofline.py [--repeats 5] [--new 150] [--json FILE]
    OMP_NUM_THREADS=2 python benchmarks/roofline.py --shape 1b --folder DIR --repeats 3 --new 24 \
        --sizes 32 --json FILE

In turn, as often as --repeats says: single passes are measured, as ``blt calibrate-cost`` does, and
each sampler generates once from each prompt. What comes after the first byte is timed and priced.
Both medians are over the repeats, so that a drift of the machine's speed meets both; no figure of a
sampler reaches the model that predicts it. Repeats that FILE has already count too: a long run can
be cut into several. DIR is where transformers_speed.py keeps its random weights of the 1B shape, or
where they are written now (9.3 GB). --kernels, --scorer-dtype and --compile are as in runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cattrs
import torch
from transformers_speed import prompt, write_model

from blt_core.cli.progress import progress_bar
from blt_core.component import BuildContext
from blt_core.pipeline import Pipeline
from blt_core.types import Parameters, Passes
from blt_plugins.cost.calibration import Calibration, processor
from blt_plugins.cost.measuring import measure
from blt_plugins.cost.roofline import Roofline, RooflineParams

SAMPLERS = (
    "ar",
    "blt-s draft_bytes=4",
    "blt-s draft_bytes=8",
    "blt-s draft_bytes=16",
    "blt-lookup draft_bytes=8",
    "blt-lookup draft_bytes=24",
    "speculative drafter.use=lookup",
    "blt-cascade draft_bytes=16",
    "blt-auto cost.use=per-pass",
)
#: The tenth: for decoders that denoise, and for others.
BLOCKS, OTHER = "blt-dv block_bytes=8", "speculative drafter.use=until drafter.drafter.use=self"


def main() -> None:
    """Measure, predict and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=("demo", "1b"), default="demo")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=150, help="bytes generated of each prompt")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 600], help="of prompts")
    parser.add_argument("--kernels", default="measured", help="measured, fixed, or a file")
    parser.add_argument("--scorer-dtype", default="float32", help="of the byte scorer")
    parser.add_argument("--compile", action="store_true", help="with compiled passes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        pipeline = load(options, options.folder or Path(work))
        found = run(pipeline, options)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def load(options: argparse.Namespace, folder: Path) -> Pipeline:
    """The model that is measured."""
    run: dict[str, Any] = {"checkpoint": "demo:python"}
    if options.shape == "1b":
        if not (folder / "config.json").exists():
            write_model(folder, "1b")
        run = {"checkpoint": str(folder), "dtype": "bfloat16"}
    run |= {"kernels": options.kernels, "scorer_dtype": options.scorer_dtype}
    run["compile"] = options.compile
    return Pipeline.from_config({"schema": 1, "run": run})


def run(pipeline: Pipeline, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds measured and predicted, of each sampler at each repeat."""
    tenth = BLOCKS if pipeline.model.decoder.denoises else OTHER
    pipelines = {spec: pipeline.with_sampler(spec) for spec in (*SAMPLERS, tenth)}
    prompts = [prompt(size) for size in options.sizes]
    passes: dict[str, list[tuple[Passes, Passes]]] = {}
    measured: dict[str, list[float]] = {spec: [] for spec in pipelines}
    calibrations: list[Calibration] = []
    names = list(pipelines)
    for spec in names[:2]:
        pipelines[spec].generate(prompts[0], max_new_bytes=4)  # warm-up
    done = json.loads(options.json.read_text()) if options.json and options.json.exists() else None
    if done:
        calibrations += [cattrs.structure(each, Calibration) for each in done["calibrations"]]
        for spec, row in done["samplers"].items():
            measured[spec] += row["measured"]
    before = len(calibrations)
    with progress_bar() as bar:
        task = bar.add_task("", total=options.repeats * (len(pipelines) + 1))
        for repeat in range(before, before + options.repeats):
            calibrations.append(measure(pipeline, options.shape, lambda: None))
            print(f"measured {time.perf_counter():.0f}", file=sys.stderr, flush=True)
            bar.advance(task)
            for place in range(len(names)):  # each is once the first after the single passes
                spec = names[(place + repeat * 3) % len(names)]
                bar.update(task, description=spec)
                found = [generate(pipelines[spec], text, options.new) for text in prompts]
                measured[spec].append(sum(seconds for seconds, _ in found))
                print(f"{spec} {measured[spec][-1]:.2f}", file=sys.stderr, flush=True)
                passes[spec] = [each for _, each in found]
                bar.advance(task)
    sizes = pipeline.parameter_counts
    rows = {}
    for spec, seconds in measured.items():
        predicted = [
            sum(
                price(each, all_, sizes) - price(each, first, sizes) for first, all_ in passes[spec]
            )
            for each in calibrations
        ]
        total = sum((each for _, each in passes[spec]), Passes())
        rows[spec] = {
            "predicted": predicted,
            "measured": seconds,
            "error": statistics.median(predicted) / statistics.median(seconds) - 1,
            "n_dec": total.decoder,
            "n_enc": total.encoder,
        }
    return {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shape": options.shape,
        "dtype": pipeline.settings.dtype,
        "kernels": pipeline.model.kernels or options.kernels,
        "scorer_dtype": options.scorer_dtype,
        "compile": options.compile,
        "new_bytes": options.new,
        "prompts": options.sizes,
        "calibrations": [each.to_json() for each in calibrations],
        "samplers": rows,
    }


def generate(pipeline: Pipeline, text: bytes, new: int) -> tuple[float, tuple[Passes, Passes]]:
    """Seconds after the first byte; the passes up to it, and all of them."""
    steps = pipeline.steps([text], max_new_bytes=new)
    first = last = next(steps)
    began = time.perf_counter()
    for step in steps:
        last = step
    return time.perf_counter() - began, (first.progress[0].passes, last.progress[0].passes)


def price(found: Calibration, passes: Passes, sizes: Parameters) -> float:
    """Seconds that a calibration says passes take."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.json"
        path.write_text(json.dumps(found.to_json()))
        model = Roofline(RooflineParams(file=str(path)), BuildContext())
        return model.cost(passes, sizes).total


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    machine = f"{found['shape']}, {found['dtype']}, {found['threads']} threads, {found['cpu']}"
    repeats = len(found["calibrations"])
    lines = [
        machine,
        f"{found['new_bytes']} bytes after prompts of {found['prompts']}",
        f"seconds, median of {repeats} (min to max)",
    ]
    for spec, row in found["samplers"].items():
        lines.append(
            f"  {spec:<52} predicted {told(row['predicted'])}  measured {told(row['measured'])}"
            f"  {row['error']:+7.1%}  N_dec {row['n_dec']} N_enc {row['n_enc']}"
        )
    errors = sorted(abs(row["error"]) for row in found["samplers"].values())
    lines.append(f"  error: median {statistics.median(errors):.1%}, worst {errors[-1]:.1%}")
    return "\n".join(lines)


def told(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):6.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
