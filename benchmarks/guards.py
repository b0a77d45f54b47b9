"""What the guards of the decode engine cost, each by itself, against a byte of ``ar``.

    OMP_NUM_THREADS=1 python benchmarks/guards.py

A guard looks at what a component gave: cache lengths after a pass, text after a round. Each is
timed alone, over many calls, with what it looks at in a run of the demo model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from blt_core.decoding.engine import check_round
from blt_core.decoding.passes import ModelPasses
from blt_core.decoding.rows import RowState
from blt_core.decoding.state import DecodeState
from blt_core.pipeline import Pipeline
from blt_core.types import Round

CALLS = 20_000


def microseconds(call: Callable[[], object]) -> float:
    """The median of 5 runs of CALLS calls, a call."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - begin) / CALLS * 1e6)
    return statistics.median(times)


def byte_of_ar(pipeline: Pipeline) -> float:
    """Microseconds of the median byte of 200, greedy, after one run that warms up."""
    times: list[float] = []
    for _ in range(2):
        times, last = [], time.perf_counter()
        for _ in pipeline.steps("def main():\n", max_new_bytes=200):
            now = time.perf_counter()
            times.append(now - last)
            last = now
    return statistics.median(times) * 1e6


def main() -> None:
    """Print a table."""
    pipeline = Pipeline.from_config({"schema": 1, "run": {"checkpoint": "demo:python"}})
    model = pipeline.model
    state = DecodeState(model, [model.scheme.encode(b"def main():\n    print(")], [100])
    state.next_logits([1])
    passes: ModelPasses = state._passes  # noqa: SLF001 -- what is timed is inside
    row: RowState = state._rows[0]  # noqa: SLF001
    lengths = state.lengths
    state.append([[97]])
    done = Round([[97]], [0], [0])
    check = passes._check_lengths  # noqa: SLF001
    decoder, patcher = passes._decoder, passes._patcher  # noqa: SLF001
    guards = {
        "lengths after a scorer pass": lambda: check(
            "patcher",
            patcher,
            [row.scored],
        ),
        "lengths after a decoder pass": lambda: (
            check("decoder", decoder.rows, [*decoder.rows.lengths]),
            check("decoder", decoder.latents, [*decoder.latents.lengths]),
        ),
        "text that was output": lambda: (state.commit(), state.rewritten(0)),
        "what a round reports": lambda: check_round(state, lengths, done),
    }
    byte = byte_of_ar(pipeline)
    print(f"{'median byte of ar':32} {byte:8.1f} us")
    total = 0.0
    for name, guard in guards.items():
        cost = microseconds(guard)
        total += cost
        print(f"{name:32} {cost:8.2f} us  {cost / byte:7.2%}")
    print(f"{'all of a byte':32} {total:8.2f} us  {total / byte:7.2%}")


if __name__ == "__main__":
    main()
