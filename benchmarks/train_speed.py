"""Speed of a training step: as it is, with dense attention masks, and as it was before.

    python benchmarks/train_speed.py [--threads 2] [--processes 2] [--precision float32] [--json]
    python benchmarks/train_speed.py --quick                a first look, in a few minutes
    python benchmarks/train_speed.py --prepared             patches made ahead
    python benchmarks/train_speed.py --config benchmarks/train_speed_1b.toml
    python benchmarks/train_speed.py --device cuda
    git worktree add ../before 16b0cd7
    python benchmarks/train_speed.py --before ../before     also an older checkout of the project

bytes/s is that of whole optimizer steps of the training loop: data, the scorer's patches (unless
they are --prepared), forward, backward, clipping, AdamW. The model is that of --config with random
weights, the text the standard library of the running interpreter, the patches are those of
``demo:python``. Measured are the objectives of OBJECTIVES with --threads threads, the passes of a
step one after another and, on a CPU with several, two side by side; and with --processes, as many
processes of one thread each (torchrun, DDP) that share the passes of the same steps.

dense masks: the same step, where the decoder attends by one boolean mask over [clean rows; block
rows], (N + n·B)² for n blocks of B bytes, and other windows are masks over all rows. Before
anything is measured, the gradients of both have to agree in float32: for each parameter the largest
absolute difference over the largest absolute gradient of that parameter, at most TOLERANCE.

before: the same config, from the same weights, run by the packages of another checkout. What it
cannot do yet (bfloat16, several processes) is said and left out. Its batches are packed in its own
way, so its steps hold other text of the same kind.

Each repeat runs every side in processes of their own, which take turns; a repeat is --steps steps
after as many to warm up, fewer for dense masks. Ratios are those of the medians, with the least and
the most of the repeats; the spread of the repeats is the machine's noise.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from cattrs import structure
from dense_masks import dense_masks
from torch import Tensor, distributed

import blt_core

try:
    from blt_core.plugins.loading import load_plugins
    from blt_core.storage.tensors import model_config, model_tensors
    from blt_core.wiring.config import Config, load_config
    from blt_plugins.training.backends.torch import TorchBackend, TorchBackendParams
    from blt_plugins.training.data.load import load_data
    from blt_plugins.training.run.job import Job
    from blt_plugins.training.run.make_job import make_job
    from blt_plugins.training.run.phases import Phase, make_phases
    from blt_plugins.training.run.report import LineReport
    from blt_plugins.training.run.trainer import Trainer
    from blt_plugins.training.setup.settings import TrainSettings
except ModuleNotFoundError:  # --before: an older checkout, where they stood elsewhere
    from blt_core.checkpoint import model_config, model_tensors
    from blt_core.config import Config, load_config
    from blt_plugins.training.backend import TorchBackend, TorchBackendParams
    from blt_plugins.training.job import make_job
    from blt_plugins.training.loop import Job, Trainer
    from blt_plugins.training.phases import Phase, make_phases
    from blt_plugins.training.report import LineReport
    from blt_plugins.training.settings import TrainSettings

    from blt_core.plugins import load_plugins
    from blt_plugins.training.data import load_data

CHECKOUT = Path(__file__).resolve().parents[1]
CONFIG = Path(__file__).with_suffix(".toml")
#: Both objectives with blocks have about 1.5 block rows a byte, where patches have four bytes.
OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "ar": {"use": "ar"},
    "block-diffusion, blocks of 8": {
        "use": "block-diffusion",
        "block_bytes": 8,
        "share": 0.4,
        "inside_share": 0.1,
        "stale_share": 0.25,
    },
    "block-diffusion, blocks of 16": {
        "use": "block-diffusion",
        "block_bytes": 16,
        "share": 0.2,
        "inside_share": 0.05,
        "stale_share": 0.125,
    },
}
NOW, DENSE, BEFORE = "now", "dense masks", "before"
TOLERANCE = 1e-5
#: Passes that the means of patches and block rows are of.
SAMPLE = 16


def main() -> None:
    """Check, measure and print."""
    options = parse()
    if options.worker:
        work(structure(json.loads(options.worker.read_text()), Task))
        return
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        start = make_start(options, Path(folder))
        checks = {name: check(name, options, start) for name in OBJECTIVES}
        for name, each in checks.items():
            print(f"{name}: gradients differ by {each.difference:.1e}", file=sys.stderr)
            if not each.difference <= TOLERANCE:
                sys.exit(f"{name}: {each.worst} is another with dense masks; nothing is measured")
        if options.device == "cuda":
            torch.cuda.empty_cache()  # what is measured runs in processes of its own
        layouts, notes = measure(options, start)
    figures = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "precision": options.precision,
        "prepared": options.prepared,
        "repeats": options.repeats,
        "steps": options.steps,
        "before": revision(options.before) if options.before else None,
        "notes": notes,
        "checks": {name: attrs.asdict(each) for name, each in checks.items()},
        "layouts": [attrs.asdict(each) for each in layouts],
    }
    print(json.dumps(figures) if options.json else table(figures))


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    cores = os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=cores, help="of the single process")
    parser.add_argument(
        "--processes", type=int, default=1, help="2: also measure two of one thread each"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the model and the step")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prepared", action="store_true", help="patches made ahead of time")
    parser.add_argument("--before", type=Path, help="another checkout of the project")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of a repeat")
    parser.add_argument("--quick", action="store_true", help="two repeats of two steps")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # a task to measure
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.steps = 2, 2
    if options.processes not in (1, 2):
        parser.error("--processes: 1 or 2")
    if options.device == "cuda" and options.processes > 1:
        parser.error("--processes: several are for a CPU")
    return options


# -- what is trained ------------------------------


@attrs.frozen
class Start:
    """What all sides train on: a checkpoint of random weights and the patcher, and a corpus."""

    checkpoint: str
    corpus: Mapping[str, str]


def make_start(options: argparse.Namespace, folder: Path) -> Start:
    """Write the checkpoint, and the patches if they are to be made ahead.

    The text is the modules at the top of the standard library: no packages, so nothing that is
    installed.
    """
    text = {"use": "folder", "path": sysconfig.get_paths()["stdlib"], "pattern": "*.py"}
    config = load_config(options.config)
    train, start = {**config.tables["train"], "steps": 1}, Start(str(folder / "start"), text)
    config = config.with_table("train", train).with_table("corpus", text)
    job = make_job(config, load_plugins(), out=folder)
    job.format.write(Path(start.checkpoint), model_config(job.model), model_tensors(job.model))
    if not options.prepared:
        return start
    from blt_plugins.training.data.prepare import prepare  # not in every checkout

    shards, source = folder / "prepared", tables("ar", options.config, start, steps=1)
    executor = {"use": "local", "workers": options.threads}
    prepare(Config.from_mapping({**source, "executor": executor}), shards, shard_bytes=1_000_000)
    return attrs.evolve(start, corpus={"use": "prepared", "path": str(shards)})


def tables(
    objective: str,
    path: Path,
    start: Start,
    *,
    steps: int,
    device: str = "cpu",
    precision: str = "float32",
    at_once: int = 1,
) -> dict[str, Any]:
    """The training config of an objective: by that at ``path``, from ``start``."""
    train = {**load_config(path).tables["train"], "steps": 2 * steps, "log_every": steps}
    train |= {"precision": precision, "tensorboard": False, "keep_states": 1}
    del train["scorer"]
    known = attrs.fields_dict(TrainSettings)  # an older checkout has fewer of them
    config = {
        "schema": 1,
        "run": {"checkpoint": start.checkpoint, "device": device},
        "corpus": start.corpus,
        "objective": OBJECTIVES[objective],
        "train": {key: value for key, value in train.items() if key in known},
    }
    if at_once > 1:
        config["training_backend"] = {"use": "torch", "parallel_passes": at_once}
    return config if objective == "ar" else {**config, "decoder": {"denoises": True}}


# -- that both are the same ------------------------------


@attrs.frozen
class Check:
    """What the first pass of an objective is like, and how its gradients compare.

    difference: the largest over all parameters of max |g - g_dense| / max |g_dense|, which is that
    of the parameter ``worst``; overall: the same ratio of the maxima over all parameters together.
    patch_bytes, block_rows: mean length of a patch, and rows of blocks a byte, padding included.
    """

    parameters: int
    patch_bytes: float
    block_rows: float
    difference: float
    worst: str
    overall: float


def check(objective: str, options: argparse.Namespace, start: Start) -> Check:
    """Compare the gradients of one pass in float32, of the same weights and batch."""
    settings = tables(objective, options.config, start, steps=1, device=options.device)
    config = Config.from_mapping(settings)
    out = Path(start.checkpoint).with_name("check")
    job = make_job(config, load_plugins(), out=out)
    data = load_data(job.corpus, job.settings, job.model)
    *_, phase = make_phases(job.model, job.objective, job.settings, data.documents, data.windows)
    found = gradients(phase)
    with dense_masks():
        dense = gradients(phase)
    if found.keys() != dense.keys():
        sys.exit(f"{objective}: only one of both has gradients of {found.keys() ^ dense.keys()}")
    apart = {name: float((found[name] - dense[name]).abs().max()) for name in dense}
    sizes = {name: float(gradient.abs().max()) for name, gradient in dense.items()}
    if not all(map(math.isfinite, [*apart.values(), *sizes.values()])):
        sys.exit("a gradient is no number")
    ratios = {name: apart[name] / sizes[name] if apart[name] else 0.0 for name in dense}
    worst = max(ratios, key=lambda name: ratios[name])
    return Check(
        parameters=sum(parameter.numel() for parameter in phase.module.parameters()),
        **amounts(job, phase),
        difference=ratios[worst],
        worst=worst,
        overall=max(apart.values()) / max(sizes.values()),
    )


def gradients(phase: Phase) -> dict[str, Tensor]:
    """Of the first pass of the first step."""
    phase.module.zero_grad(set_to_none=True)
    named = list(phase.module.named_parameters())
    loss, _ = phase.module(phase.batches[0].to(named[0][1].device), phase.generator(0, 0))
    loss.backward()
    return {name: each.grad for name, each in named if each.grad is not None}


def amounts(job: Job, phase: Phase) -> dict[str, float]:
    """Mean bytes of a patch, and block rows a byte, of the first passes."""
    size = patches = rows = 0
    for number in range(SAMPLE):
        batch = phase.batches[number].to(job.model.device)
        flags = job.model.patcher.flags(batch.rows, None)
        size, patches = size + batch.scored, patches + int(flags.sum())
        if hasattr(job.objective, "blocks"):
            drawn = job.objective.blocks(flags, batch.targets_br, phase.generator(number, 0))
            rows += sum(each.ids_bnB.numel() for each in drawn)
    return {"patch_bytes": size / patches, "block_rows": rows / size}


# -- measuring, each side in a process of its own ------------------------------


@attrs.frozen
class Task:
    """What one process, or several under torchrun, measures with one checkout.

    at_once: passes of a step that run side by side. dense_steps: 0 to leave dense masks out.
    folder: to write into.
    """

    checkout: str
    config: str
    start: Start
    device: str
    precision: str
    processes: int
    threads: int
    at_once: int
    steps: int
    dense_steps: int
    folder: str = ""


@attrs.frozen
class Result:
    """What a task has measured: (objective, side, bytes/s) each, or what its checkout lacks."""

    speeds: list[tuple[str, str, float]]
    lacks: list[str]


@attrs.frozen
class Layout:
    """The figures of some processes, threads and passes at once: objective, side, speeds."""

    processes: int
    threads: int
    at_once: int = 1
    bytes_per_second: dict[str, dict[str, list[float]]] = attrs.field(
        factory=lambda: {name: {} for name in OBJECTIVES}
    )


def measure(options: argparse.Namespace, start: Start) -> tuple[list[Layout], list[str]]:
    """Speeds of all layouts and sides, and what could not be measured."""
    layouts = [Layout(1, options.threads)]
    if options.device == "cpu" and options.threads > 1:
        layouts.append(Layout(1, options.threads, at_once=2))
    if options.processes > 1:
        layouts.append(Layout(options.processes, 1))
    sides = [(NOW, CHECKOUT)]
    if options.before:
        sides.append((BEFORE, options.before.resolve()))
    lacking: dict[str, None] = {}
    for repeat in range(options.repeats):
        sides.reverse()  # so that neither always comes first
        for layout in layouts:
            for side, checkout in sides:
                result = run(task_of(options, start, layout, checkout))
                lacking |= dict.fromkeys(result.lacks)
                for objective, which, speed in result.speeds:
                    name = BEFORE if side == BEFORE else which
                    layout.bytes_per_second[objective].setdefault(name, []).append(speed)
        print(f"repeat {repeat + 1} of {options.repeats}", file=sys.stderr)
    return layouts, list(lacking)


def task_of(options: argparse.Namespace, start: Start, layout: Layout, checkout: Path) -> Task:
    """One repeat of one side; dense masks are for passes one after another."""
    dense = checkout == CHECKOUT and layout.at_once == 1
    return Task(
        checkout=str(checkout),
        config=str(options.config.resolve()),
        start=start,
        device=options.device,
        precision=options.precision,
        processes=layout.processes,
        threads=layout.threads,
        at_once=layout.at_once,
        steps=options.steps,
        dense_steps=max(options.steps // 4, 1) if dense else 0,
    )


def run(task: Task) -> Result:
    """Start this file again with the packages of the task's checkout."""
    roots = (task.checkout, str(Path(task.checkout) / "plugins"))
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(roots),  # goes before what is installed
        "OMP_NUM_THREADS": str(task.threads),
    }
    launch = [sys.executable]
    if task.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc-per-node", str(task.processes)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.json"
        path.write_text(json.dumps({**attrs.asdict(task), "folder": folder}))
        command = [*launch, __file__, "--worker", str(path)]
        code = subprocess.run(command, check=False, env=env, stdout=sys.stderr).returncode
        if code:
            sys.exit(f"{task.checkout}: the measurement ended with exit status {code}")
        return Result(**json.loads((Path(folder) / "result.json").read_text()))


def work(task: Task) -> None:
    """Measure all objectives of a task in this process, and write the result."""
    if Path(blt_core.__file__).resolve().parents[1] != Path(task.checkout):
        sys.exit(f"{blt_core.__file__} was imported, which is not in {task.checkout}")
    result = Result([], lacks(task))
    if not result.lacks:
        if task.processes > 1:
            distributed.init_process_group("gloo")  # once, for all runs of this process
        for objective in OBJECTIVES:
            result.speeds.append((objective, NOW, speed_of(task, objective, NOW)))
            if task.dense_steps:
                with dense_masks():
                    result.speeds.append((objective, DENSE, speed_of(task, objective, DENSE)))
        if task.processes > 1:
            distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        (Path(task.folder) / "result.json").write_text(json.dumps(attrs.asdict(result)))


def lacks(task: Task) -> list[str]:
    """What a checkout cannot do yet, in words."""
    found = []
    if task.precision != "float32" and "precision" not in attrs.fields_dict(TrainSettings):
        found.append(f"{task.checkout} trains in float32 only: --precision float32")
    if task.processes > 1 and not hasattr(TorchBackend, "mean"):
        found.append(f"{task.checkout} trains in one process only")
    parallel = "parallel_passes" in attrs.fields_dict(TorchBackendParams)
    if task.start.corpus["use"] not in load_plugins().registry.names("corpus"):
        found.append(f"{task.checkout} computes patches in each step only")
    if task.at_once > 1 and not parallel:
        found.append(f"{task.checkout} runs passes one after another only")
    return found


def speed_of(task: Task, objective: str, side: str) -> float:
    """Bytes/s of a run's second half, as the training loop has logged it (0 but in process 0)."""
    steps = task.dense_steps if side == DENSE else task.steps
    settings = tables(
        objective,
        Path(task.config),
        task.start,
        device=task.device,
        precision=task.precision,
        steps=steps,
        at_once=task.at_once,
    )
    config = Config.from_mapping(settings)
    out = Path(task.folder) / side / objective
    job = make_job(config, load_plugins(), out=out)
    Trainer(job, LineReport(io.StringIO())).run()
    path = out / "metrics.jsonl"
    if os.environ.get("RANK", "0") != "0":
        return 0.0
    # With log_every = steps there are two lines: warming up, and what counts.
    *_, last = map(json.loads, path.read_text().splitlines())
    return float(last["bytes_per_second"])


# -- what is printed ------------------------------


def revision(checkout: Path) -> str:
    """The revision of a checkout, or else its path."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout.strip() or str(checkout)


def table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    checks = figures["checks"]
    first = next(iter(checks.values()))
    about = (
        f"torch {figures['torch']}",
        figures["device"],
        figures["precision"],
        f"{first['parameters'] / 1e6:.1f}M trained parameters",
        f"patches of {first['patch_bytes']:.1f} bytes" + ", made ahead" * figures["prepared"],
    )
    counts = f"{figures['repeats']} repeats of {figures['steps']} steps"
    lines = [", ".join(about), f"bytes/s of whole steps: median (least to most) of {counts}"]
    for layout in figures["layouts"]:
        processes, threads = layout["processes"], layout["threads"]
        beside = f", {layout['at_once']} passes at once" if layout["at_once"] > 1 else ""
        lines.append(f"{processes} process{'es' * (processes > 1)} x {threads} threads{beside}")
        for objective, sides in layout["bytes_per_second"].items():
            rows = checks[objective]["block_rows"]
            lines.append(f"  {objective}" + f", {rows:.1f} block rows a byte" * (rows > 0))
            lines += [f"    {side_line(side, sides)}" for side in sides]
    if figures["before"]:
        lines.append(f"before: {figures['before']}")
    lines += figures["notes"]
    lines.append("gradients, float32: largest difference to those with dense masks")
    lines += [
        f"  {name:<30} {each['difference']:.1e} ({each['worst']}), overall {each['overall']:.1e}"
        for name, each in checks.items()
    ]
    return "\n".join(lines)


def side_line(side: str, sides: Mapping[str, list[float]]) -> str:
    """Speed of one side, and how many times as fast the step is now."""
    speeds, now = sides[side], sides[NOW]
    median = statistics.median(speeds)
    line = f"{side:<12} {median:9.0f}  ({min(speeds):.0f} to {max(speeds):.0f})"
    if side == NOW:
        return line
    ratios = [one / other for one, other in zip(now, speeds, strict=True)]
    ratio = statistics.median(now) / median
    return f"{line}  now {ratio:.2f} x  ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
