"""Would weights of int8 pay? The products of a byte of ``ar``, in bfloat16 and weight-only int8.

Which weights a byte is multiplied by, and how often, is counted on a model; then each shape is
timed at one row, over distinct weights that exceed the cache, in turns: in bfloat16 by torch and by
the native kernel, in int8 by torch's own product and, where it is installed, by torchao. The sum
over a byte is what int8 could gain at most: what a byte does besides its products stays.

    python benchmarks/transformers_speed.py --shape 1b --folder DIR    writes the 1B shape
    python benchmarks/int8.py --folder DIR --threads 2

Also how much rounding to int8 costs, in bits per byte of a model's held-out text:

    python benchmarks/int8.py --folder demo:python --held-out corpora/python/valid
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blt_core.errors import RunError
from blt_core.kernels import native
from blt_core.kernels.machine import machine, read_bandwidth
from blt_core.kernels.measuring import spread
from blt_core.nn.linear import Multiply, fixed_product
from blt_core.pipeline import Pipeline

PROMPT = Path(__file__).parent / "prompts" / "python-1.txt"
Shape = tuple[int, int]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", default="demo:python", help="a checkpoint")
    parser.add_argument("--held-out", type=Path, help="text to score with and without rounding")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new", type=int, default=16, help="bytes that calls are counted on")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.held_out is not None:
        print(json.dumps(rounding(options.folder, options.held_out)))
        return
    try:
        native.build()
    except RunError as error:
        print(error)
    calls = calls_a_byte(options.folder, options.new)
    found = {
        f"{n} x {k}": {"calls": calls[n, k], **times((n, k), options.repeats)} for n, k in calls
    }
    print(json.dumps(found) if options.json else table(found, options))


def calls_a_byte(folder: str, count: int) -> dict[Shape, float]:
    """Products with one row, by the shape of the weight, of an average byte of ``ar``."""
    run = {"checkpoint": folder, "dtype": "bfloat16", "scorer_dtype": "bfloat16"}
    pipeline = Pipeline.from_config({"schema": 1, "run": run}).with_sampler("ar")
    calls: Counter[Shape] = Counter()

    def add(module: nn.Module, inputs: tuple[Tensor, ...], _output: Any) -> None:
        if isinstance(module, nn.Linear) and inputs[0].numel() == module.in_features:
            calls[module.out_features, module.in_features] += 1

    modules = [m for m in pipeline.model.module_dict().modules() if isinstance(m, nn.Linear)]
    hooks = [module.register_forward_hook(add) for module in modules]
    text = PROMPT.read_bytes()[:64]
    for index, _ in enumerate(pipeline.steps([text], max_new_bytes=count + 1)):
        if index == 0:
            calls.clear()
    for hook in hooks:
        hook.remove()
    return {shape: number / count for shape, number in sorted(calls.items())}


# -- products ------------------------------


def times(shape: Shape, repeats: int) -> dict[str, float]:
    """Median seconds of one product with one row, by kernel."""
    torch.manual_seed(0)
    weights = spread({"": [torch.randn(shape).to(torch.bfloat16) * 0.02]})[""]
    x = torch.randn(1, shape[1]).to(torch.bfloat16)
    made = {name: [make(weight) for weight in weights] for name, make in products().items()}
    found: dict[str, list[float]] = {name: [] for name in made}
    with torch.inference_mode():
        for each in made.values():
            each[0](x)
        for _ in range(repeats):
            for name, each in made.items():
                began = time.perf_counter()
                for multiply in each:
                    multiply(x)
                found[name].append((time.perf_counter() - began) / len(each))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def products() -> Mapping[str, Callable[[Tensor], Multiply]]:
    """What makes the product with a weight, by name; the bfloat16 ones first."""
    made: dict[str, Callable[[Tensor], Multiply]] = {"torch bfloat16": by_torch}
    run = native.load()
    if run is not None:
        made["native bfloat16"] = lambda weight: lambda x: run(x, weight)
    made["torch int8"] = by_torch_int8
    try:
        import torchao  # noqa: F401 -- whether it is there
    except ImportError:
        return made
    return {**made, "torchao int8": by_torchao, "torchao compiled": by_torchao_compiled}


def by_torch(weight: Tensor) -> Multiply:
    """Torch's product in bfloat16, by the fixed rule."""
    return lambda x: fixed_product(x, weight)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and a scale for each row of a weight, symmetric."""
    scales = weight.float().abs().amax(dim=1, keepdim=True) / 127
    return (weight.float() / scales).round().clamp(-127, 127).to(torch.int8), scales


def by_torch_int8(weight: Tensor) -> Multiply:
    """Torch's own product of bfloat16 rows with int8 weights."""
    values, scales = quantized(weight)
    halved = scales.squeeze(1).to(weight.dtype)
    return lambda x: torch._weight_int8pack_mm(x, values, halved)  # noqa: SLF001 -- no public name


def torchao_module(weight: Tensor) -> nn.Module:
    """A Linear whose weight torchao has rounded."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    module.weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(module, Int8WeightOnlyConfig(version=2))
    return module


def by_torchao(weight: Tensor) -> Multiply:
    """Torchao's weight-only int8, eager."""
    return torchao_module(weight)


def by_torchao_compiled(weight: Tensor) -> Multiply:
    """Torchao's weight-only int8 as it is meant to run."""
    made: Multiply = torch.compile(torchao_module(weight), mode="max-autotune")
    return made


# -- rounding ------------------------------


def rounding(folder: str, held_out: Path) -> dict[str, float]:
    """Bits per byte of held-out text, with the weights as they are and rounded to int8."""
    pipeline = Pipeline.from_config({"schema": 1, "run": {"checkpoint": folder}})
    found = sorted(held_out.rglob("*")) if held_out.is_dir() else [held_out]
    files = [path for path in found if path.is_file()]
    text = b"".join(file.read_bytes() for file in files)[:60_000]
    size = 1024
    texts = [text[at : at + size] for at in range(0, len(text), size)]

    def bits() -> float:
        return -sum(score.logprob for score in pipeline.score(texts)) / math.log(2) / len(text)

    before = bits()
    with torch.no_grad():
        for module in pipeline.model.module_dict().modules():
            if isinstance(module, nn.Linear):
                values, scales = quantized(module.weight)
                module.weight.copy_((values.float() * scales).to(module.weight.dtype))
    return {"bits_per_byte": before, "int8_bits_per_byte": bits()}


# -- the table ------------------------------


def table(found: Mapping[str, Mapping[str, float]], options: argparse.Namespace) -> str:
    """Each shape, and the sum over a byte."""
    here = machine()
    names = [name for name in next(iter(found.values())) if name != "calls"]
    lines = [
        f"{here.cpu}, torch {here.torch}, {options.threads} threads; {options.folder}",
        f"plain read {read_bandwidth():.1f} GB/s; microseconds of a product with one row",
        f"{'weight':<14}{'a byte':>8}" + "".join(f"{name:>18}" for name in names),
    ]
    for shape, row in found.items():
        lines.append(
            f"{shape:<14}{row['calls']:>8.1f}" + "".join(f"{row[n] * 1e6:>18.0f}" for n in names)
        )
    sums = {name: sum(row["calls"] * row[name] for row in found.values()) for name in names}
    lines.append(f"{'of a byte, ms':<22}" + "".join(f"{sums[n] * 1e3:>18.1f}" for n in names))
    best = min(sums[n] for n in names if n.endswith("bfloat16"))
    lines.append(f"{'best bfloat16 / it':<22}" + "".join(f"{best / sums[n]:>18.2f}" for n in names))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
