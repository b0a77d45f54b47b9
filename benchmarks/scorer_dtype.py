"""How many patches change where the byte scorer runs in another dtype.

Over held-out text, in pieces of the model's context: the share of boundaries (patches that begin at
another byte, of all bytes and of all patches), how far entropies lie apart, and the mean patch.

    python benchmarks/scorer_dtype.py [--model demo:python] [--dtype bfloat16] [FILE ...] [--json]

Without FILE: the held-out prompts of benchmarks/prompts, which are Python code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from blt_core.loading import build_model, plan_run
from blt_core.model import Model
from blt_core.plugins.loading import load_plugins
from blt_core.types import Rows
from blt_core.wiring.config import Config

PROMPTS = Path(__file__).parent / "prompts"
#: Bytes of a piece, where the model's context is longer.
PIECE = 2000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--model", default="demo:python", help="a checkpoint")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    files = options.files or sorted(PROMPTS.glob("*.txt"))
    exact = load(options.model, "float32")
    text = b"\n".join(path.read_bytes() for path in files)
    pieces = list(rows_of(exact, text))
    found = compare(exact, load(options.model, options.dtype), pieces)
    if options.json:
        print(json.dumps(found))
        return
    first, second = found["patch_bytes"]
    print(f"{options.model}, {found['bytes']:,} bytes, scorer in {options.dtype} and in float32")
    shares = f"{found['of_bytes']:.2%} of the bytes, {found['of_patches']:.2%} of the patches"
    print(f"  boundaries that differ  {found['changed']:,}: {shares}")
    print(f"  mean patch              {second:.3f} and {first:.3f} bytes")
    apart = f"{found['nats']:.4f} nats on average, {found['most_nats']:.3f} at most"
    print(f"  entropies apart         {apart}")


def load(checkpoint: str, scorer_dtype: str) -> Model:
    """The model, its scorer in a dtype; the other parts do not run."""
    run = {"checkpoint": checkpoint, "scorer_dtype": scorer_dtype}
    config = Config.from_mapping({"schema": 1, "run": run})
    return build_model(*plan_run(config, load_plugins()))


def rows_of(model: Model, text: bytes) -> Iterator[Rows]:
    """The text in pieces, each after a BOS."""
    size = min(PIECE, model.context_bytes)
    for begin in range(0, len(text), size):
        ids = [model.scheme.bos, *model.scheme.encode(text[begin : begin + size])]
        yield Rows(torch.tensor([ids]), (len(ids),))


@torch.inference_mode()
def compare(exact: Model, other: Model, pieces: list[Rows]) -> dict[str, Any]:
    """Boundaries and entropies of two models of the same weights."""
    flags = [torch.cat([m.patcher.flags(p, None)[0] for p in pieces]) for m in (exact, other)]
    nats = [torch.cat([m.patcher.entropies(p)[0] for p in pieces]) for m in (exact, other)]
    changed, apart = int((flags[0] != flags[1]).sum()), (nats[0] - nats[1]).abs()
    counts = [int(each.sum()) for each in flags]
    return {
        "bytes": len(flags[0]),
        "changed": changed,
        "of_bytes": changed / len(flags[0]),
        "of_patches": changed / counts[0],
        "patch_bytes": [len(flags[0]) / count for count in counts],
        "nats": float(apart.mean()),
        "most_nats": float(apart.max()),
    }


if __name__ == "__main__":
    main()
