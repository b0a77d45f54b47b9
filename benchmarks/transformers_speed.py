"""Speed on transformers' BLT weights: transformers without its cache against blt-core with caches.

Same random weights, same prompts, greedy, one run. bytes/s: of the output after its first byte, by
the time after it; how long the first byte takes is shown beside.

    python benchmarks/transformers_speed.py [--repeats 5] [--json]     5M parameters, float32
    python benchmarks/transformers_speed.py --shape 1b [--folder DIR]  the 1B shape, bfloat16

At 5M parameters also: whether the ids agree, and how often greedy choices agree in bfloat16. At the
1B shape (9.3 GB, skipped below 16 GB of memory) each measurement has a process of its own, and `ar`
is held against the machine's read bandwidth: bytes of weights that its passes read by the time that
they take, over what a plain sum over memory reads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch

from blt_core.kernels.machine import machine
from blt_core.pipeline import Generation, Pipeline
from blt_core.types import Rows

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PROMPTS = Path(__file__).parent / "prompts"
SMALL = {
    "encoder_hash_byte_group_vocab": 500,
    "patcher_config": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "intermediate_size": 344},
    "encoder_config": {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 344,
                       "hidden_size_global": 256},
    "decoder_config": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
                       "intermediate_size": 344, "hidden_size_global": 256},
    "global_config": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
                      "intermediate_size": 688},
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "5m": SMALL,
    "1b": {"encoder_config": {"intermediate_size": 2816}},
}
SAMPLERS = ("ar", "blt-s draft_bytes=4", "blt-s draft_bytes=8")
SIZES = (64, 512, 2000)
NEW_BYTES = {"5m": 64, "1b": 32}
LEAST_MEMORY = 16e9
#: More of ``[run]`` for blt-core.
OWN: dict[str, Any] = {}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="5m")
    parser.add_argument("--folder", type=Path, help="where the model is, or is written and kept")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kernels", default="measured", help="measured, fixed, or a file")
    parser.add_argument("--scorer-dtype", default="float32", help="of the byte scorer")
    parser.add_argument("--compile", action="store_true", help="with compiled passes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # what a process of its own measures
    options = parser.parse_args()
    OWN.update(kernels=options.kernels, scorer_dtype=options.scorer_dtype, compile=options.compile)
    if options.only:
        print(json.dumps(measure_alone(options.only, options.folder, options.repeats)))
        return
    if options.shape == "1b" and memory() < LEAST_MEMORY:
        sys.exit(f"skipped: the 1B shape wants 16 GB of memory, and there are {memory() / 1e9:.0f}")
    with tempfile.TemporaryDirectory() as work:
        folder = options.folder or Path(work)
        if not (folder / "config.json").exists():
            write_model(folder, options.shape)
        repeats = options.repeats
        figures = small(folder, repeats) if options.shape == "5m" else big(folder, repeats)
    counts = {"cpu": machine().cpu, "threads": torch.get_num_threads()}
    counts |= {"new_bytes": NEW_BYTES[options.shape]}
    figures = {**counts, **figures}
    print(json.dumps(figures) if options.json else table(figures))


# -- the model ------------------------------


def write_model(folder: Path, shape: str) -> None:
    """Random weights, scaled so that bytes vary, and a threshold that gives 4-byte patches."""
    from safetensors.torch import save_file

    from blt_plugins.huggingface.reading import tables_of
    from blt_plugins.huggingface.tensors import layout_of

    config = {"model_type": "blt", "architectures": ["BltForCausalLM"], **SHAPES[shape]}
    dtype = torch.bfloat16 if shape == "1b" else torch.float32
    config |= {"dtype": str(dtype).removeprefix("torch."), "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    sources = [s for parts in layout_of(tables_of(config, shape)).values() for s in parts]
    tensors = {source.name: weight(source.name, source.shape).to(dtype) for source in sources}
    tensors["lm_head.weight"][:4] = 0  # no EOS: all outputs are of one length
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    own = OWN.copy()
    OWN.clear()  # the threshold is of the weights, however they are run
    patcher = load(folder, "ar").model.patcher
    OWN.update(own)
    ids = torch.tensor([[1, *(value + 4 for value in prompt(1000))]])
    with torch.inference_mode():
        ordered = patcher.entropies(Rows(ids, (1001,)))[0].sort().values
    config["patching_threshold"] = float(ordered[750] + ordered[751]) / 2
    (folder / "config.json").write_text(json.dumps(config))


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """One tensor: norms are ones; a big table repeats a part of itself."""
    if len(shape) == 1:
        return torch.ones(shape)
    std = 0.6 if "embed_tokens" in name or "tok_embedding" in name else 1.5 * shape[1] ** -0.5
    rows = min(shape[0], 65_536)
    part = (torch.randn(rows, shape[1]) * std).bfloat16()
    return part.repeat(-(-shape[0] // rows), 1)[: shape[0]]


def prompt(size: int) -> bytes:
    """The first bytes of the held-out prompts."""
    return b"\n".join(path.read_bytes() for path in sorted(PROMPTS.glob("*.txt")))[:size]


def load(folder: Path, sampler: str, dtype: str | None = None) -> Pipeline:
    """The model with one of the samplers."""
    dtype = dtype or json.loads((folder / "config.json").read_text())["dtype"]
    run = {"checkpoint": str(folder), "dtype": dtype, **OWN}
    return Pipeline.from_config({"schema": 1, "run": run}).with_sampler(sampler)


def load_reference(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The same weights in transformers."""
    from transformers import BltForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return BltForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()


class Clock:
    """Takes the time of each id that transformers generates."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _ids: torch.Tensor) -> None:
        """Called with the prompt, then with each id."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called when all is done."""


@attrs.frozen
class Call:
    """One call: its ids, seconds until the first, bytes/s after it; what else is known of it."""

    ids: list[int]
    first: float
    speed: float
    result: Generation | None = None


def call_own(pipeline: Pipeline, text: bytes, count: int) -> Call:
    """Generate with blt-core."""
    result = pipeline.generate(text, max_new_bytes=count)
    return Call(list(result.ids), result.prefill_seconds, result.bytes_per_second, result)


@torch.inference_mode()
def call_reference(model: Any, text: bytes, count: int) -> Call:
    """Generate with transformers, without its cache."""
    ids, clock = torch.tensor([[1, *(value + 4 for value in text)]]), Clock()
    began = time.perf_counter()
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
        use_cache=False, pad_token_id=0, streamer=clock,
    )  # fmt: skip
    _, first, *_, last = clock.times
    new = found[0, ids.shape[1] :].tolist()
    return Call(new, first - began, (len(new) - 1) / (last - first))


# -- 5M parameters, in one process ------------------------------


def small(folder: Path, repeats: int) -> dict[str, Any]:
    """Bytes/s at each prompt size, interleaved over the repeats, and agreement."""
    reference = load_reference(folder)
    pipelines = {sampler: load(folder, sampler) for sampler in SAMPLERS}
    sizes: dict[int, dict[str, Any]] = {}
    for size in SIZES:
        text, count = prompt(size), NEW_BYTES["5m"]
        cases: dict[str, Callable[[], Call]] = {
            "transformers": partial(call_reference, reference, text, count),
            **{name: partial(call_own, each, text, count) for name, each in pipelines.items()},
        }
        for case in cases.values():
            case()  # warm-up
        calls: dict[str, list[Call]] = {name: [] for name in cases}
        for _ in range(repeats):
            for name, case in cases.items():
                calls[name].append(case())
        results = {name: each[0].result for name, each in calls.items()}
        sizes[size] = {
            "bytes_per_second": {n: [call.speed for call in each] for n, each in calls.items()},
            "first_byte_seconds": {
                n: statistics.median(call.first for call in each) for n, each in calls.items()
            },
            "same_ids": len({tuple(each[0].ids) for each in calls.values()}) == 1,
            "accepted": {n: [r.accepted, r.drafted] for n, r in results.items() if r and r.drafted},
        }
    parameters = sum(p.numel() for p in reference.parameters())
    return {"parameters": parameters, "sizes": sizes, "bfloat16": agreement(folder, reference)}


@torch.inference_mode()
def agreement(folder: Path, exact: Any) -> dict[str, float]:
    """Share of 2,000 positions of text where greedy choices agree, in bfloat16 and with float32."""
    ids = torch.tensor([[1, *(value + 4 for value in prompt(2000))]])
    model = load(folder, "ar", "bfloat16").model
    rows = Rows(ids, (ids.shape[1],))
    own = model.forward(rows, model.patcher.flags(rows, None)).clean
    if own is None:
        raise SystemExit("the decoder returned no output")
    ours = own.logits[0].argmax(-1)
    theirs = load_reference(folder, torch.bfloat16)(ids, use_cache=False).logits[0].argmax(-1)
    true = exact(ids, use_cache=False).logits[0].argmax(-1)

    def share(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one == other).float().mean())

    return {
        "ours and transformers": share(ours, theirs),
        "ours and float32": share(ours, true),
        "transformers and float32": share(theirs, true),
    }


# -- the 1B shape, a process for each measurement ------------------------------


def big(folder: Path, repeats: int) -> dict[str, Any]:
    """Each measurement in a process of its own, so that only one holds the weights."""
    here = [sys.executable, __file__, "--folder", str(folder), "--repeats", str(repeats)]
    here += ["--kernels", OWN["kernels"], "--scorer-dtype", OWN["scorer_dtype"]]
    here += ["--compile", "--only"] if OWN["compile"] else ["--only"]
    found = {}
    for name in (*SAMPLERS, "transformers"):
        done = subprocess.run([*here, name], check=True, stdout=subprocess.PIPE, text=True)
        found[name] = json.loads(done.stdout)
        print(f"{name}: {found[name]}", file=sys.stderr)
    return {"measured": found}


def measure_alone(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Speed of one way to generate after a 64-byte prompt: medians of calls after a first one."""
    text, count = prompt(64), NEW_BYTES["1b"]
    if name == "transformers":
        case = partial(call_reference, load_reference(folder), text, count)
    else:
        pipeline = load(folder, name)
        case = partial(call_own, pipeline, text, count)
    case()
    calls = [case() for _ in range(repeats)]
    done, speeds = calls[0], [call.speed for call in calls]
    figures: dict[str, Any] = {
        "bytes_per_second": statistics.median(speeds),
        "least_and_most": [min(speeds), max(speeds)],
        "first_byte_seconds": statistics.median(call.first for call in calls),
        "peak_gigabytes": peak() / 1e9,
    }
    if done.result is None:
        return figures
    passes = done.result.passes
    figures |= {"n_dec": passes.decoder, "n_enc": passes.encoder}
    if name == "ar":
        figures |= bandwidth(pipeline, text, count)
    else:
        figures["accepted"] = [done.result.accepted, done.result.drafted]
    return figures


def bandwidth(pipeline: Pipeline, text: bytes, count: int) -> dict[str, float]:
    """GB/s of weights that decoding reads after the first byte, and of a plain read of memory.

    matvec: what torch's own product of a 1024 x 1024 matrix and a vector reads, many in turn.
    """
    counted, hooks = [0], []

    def add(module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        counted[0] += module.weight.nbytes

    for module in pipeline.model.module_dict().modules():
        if isinstance(module, torch.nn.Linear):
            hooks += [module.register_forward_hook(add)]
    for index, _ in enumerate(pipeline.steps([text], max_new_bytes=count)):
        if index == 0:
            counted[0] = 0
    for hook in hooks:
        hook.remove()
    seconds = min(pipeline.generate(text, max_new_bytes=count).seconds for _ in range(3))
    used, read = counted[0] / seconds / 1e9, read_bandwidth()
    return {
        "gigabytes_per_second": used,
        "read_bandwidth": read,
        "share": used / read,
        "matvec": matvec_bandwidth(),
    }


def read_bandwidth() -> float:
    """GB/s of the best of five sums over 2 GB."""
    data = torch.ones(250_000_000, dtype=torch.int64)
    return data.nbytes / fastest(data.sum) / 1e9


@torch.inference_mode()
def matvec_bandwidth() -> float:
    """GB/s of the best of five rounds of matrix-vector products over 1 GB of bfloat16."""
    matrices, vector = torch.ones(512, 1024, 1024).bfloat16(), torch.ones(1024).bfloat16()
    return matrices.nbytes / fastest(lambda: [torch.mv(each, vector) for each in matrices]) / 1e9


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the best of five times."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def memory() -> float:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak() -> float:
    """The most bytes that this process has held, mapped files included (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


# -- what is printed ------------------------------


def table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [
        f"{figures['cpu']}, {figures['threads']} threads, {figures['new_bytes']} new bytes a call"
    ]
    if "measured" in figures:
        measured = figures["measured"]
        base = measured["transformers"]["bytes_per_second"]
        for name, each in measured.items():
            ratio = each["bytes_per_second"] / base
            lines.append(
                f"  {name:<20} {each['bytes_per_second']:7.3f} bytes/s"
                f" ({' to '.join(f'{speed:.2f}' for speed in each['least_and_most'])})"
                f"  {ratio:6.1f} x"
                f"  first byte {each['first_byte_seconds']:.1f} s"
                f"  peak {each['peak_gigabytes']:.1f} GB"
                + (f"  accepted {each['accepted']}" if "accepted" in each else "")
            )
        ar = measured["ar"]
        lines.append(
            f"  ar reads {ar['gigabytes_per_second']:.1f} GB/s of weights, "
            f"{ar['share']:.0%} of the {ar['read_bandwidth']:.1f} GB/s of a plain read; "
            f"matrix-vector products of 1024 x 1024 alone read {ar['matvec']:.1f}"
        )
        return "\n".join(lines)
    lines[0] += f", {figures['parameters'] / 1e6:.1f}M parameters; bytes/s: median (min to max)"
    for size, each in figures["sizes"].items():
        medians = {name: statistics.median(v) for name, v in each["bytes_per_second"].items()}
        lines.append(f"{size}-byte prompt, same ids: {'yes' if each['same_ids'] else 'NO'}")
        for name, speeds in each["bytes_per_second"].items():
            ratio = medians[name] / medians["transformers"]
            kept = each["accepted"].get(name)
            lines.append(
                f"  {name:<20} {medians[name]:7.1f}  ({min(speeds):.1f} to {max(speeds):.1f})"
                f"  {ratio:5.1f} x  first byte {each['first_byte_seconds'][name]:.3f} s"
                + (f"  accepted {kept[0]} of {kept[1]}" if kept else "")
            )
    shares = ", ".join(f"{name} {share:.1%}" for name, share in figures["bfloat16"].items())
    lines.append(f"greedy choices that agree in bfloat16: {shares}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
