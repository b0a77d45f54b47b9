"""What the look-up drafter costs for each byte, as the text grows.

    python benchmarks/lookup_speed.py [--bytes 1000000] [--repeats 3] [--json FILE]

No model runs: the drafter is asked again and again about a text that grows by a few bytes a round,
as it would be by a verified sampler, with a rewind in each round. "random" is text without any
repeat, "code" the Python files of the standard library, one after another, and "periodic" a line
that comes again and again. Seconds are those of the drafter alone, in microseconds for each byte of
the last tenth before each length.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blt_core.component import BuildContext
from blt_core.protocols import CacheT
from blt_core.types import Draws, IdScheme, Sampling
from blt_plugins.drafting.lookup import LookupDrafter, LookupParams

LENGTHS = (10_000, 100_000, 1_000_000)
#: Bytes that a round adds, and those of a draft that are taken back before.
STEP, DRAFTED = 8, 4


class Text:
    """As much of a decode state as the drafter asks for: one text."""

    scheme = IdScheme()

    def __init__(self) -> None:
        self.ids = [self.scheme.bos]
        self.cache: Any = None

    def text(self, row: int, start: int = 0) -> list[int]:
        """The ids from ``start`` on."""
        return self.ids[start:]

    def attach(self, owner: object, make: Any) -> CacheT:  # type: ignore[type-var]
        """The drafter's index."""
        self.cache = self.cache or make(1)
        return self.cache  # type: ignore[no-any-return]

    def grow(self, new: Sequence[int]) -> None:
        """A round: a draft that is taken back, then what stays."""
        self.cache.rewind([len(self.ids)])
        self.ids.extend(new)
        self.cache.settle([len(self.ids) - 16])


def main() -> None:
    """Time each kind of text and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", type=int, default=max(LENGTHS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    lengths = [length for length in LENGTHS if length <= options.bytes]
    found = {
        name: [times(text, lengths) for _ in range(options.repeats)]
        for name, text in texts(options.bytes).items()
    }
    medians = {
        name: {length: statistics.median(run[length] for run in runs) for length in lengths}
        for name, runs in found.items()
    }
    if options.json:
        options.json.write_text(json.dumps(medians, indent=2) + "\n", "utf-8")
    print(
        "microseconds a byte at" + "".join(f"{length:>12,}" for length in lengths), "  last/first"
    )
    for name, times_at in medians.items():
        values = list(times_at.values())
        shown = "".join(f"{value:12.2f}" for value in values)
        print(f"{name:<22}{shown}{values[-1] / values[0]:12.2f}")


def texts(size: int) -> dict[str, bytes]:
    """The three kinds of text, ``size`` bytes each."""
    folder = Path(sysconfig.get_path("stdlib"))
    code = b""
    for path in sorted(folder.glob("*.py")):
        code += path.read_bytes()
    line = b"a line that comes again and again, with nothing new in it\n"
    return {
        "random": random.Random(0).randbytes(size),
        "code": bytes(itertools.islice(itertools.cycle(code), size)),
        "periodic": bytes(itertools.islice(itertools.cycle(line), size)),
    }


def times(text: bytes, lengths: Sequence[int]) -> dict[int, float]:
    """Microseconds a byte that the drafter takes in the last tenth before each length."""
    drafter, state = LookupDrafter(LookupParams(), BuildContext()), Text()
    spent = dict.fromkeys(lengths, 0.0)
    drafter.draft(state, [1], Sampling(), Draws((0,)))  # type: ignore[arg-type]
    for start in range(0, len(text), STEP):
        began = time.perf_counter()
        drafter.draft(state, [DRAFTED], Sampling(), Draws((0,)))  # type: ignore[arg-type]
        state.grow(text[start : start + STEP])
        took = time.perf_counter() - began
        for length in lengths:
            if 0.9 * length <= start < length:
                spent[length] += took
    return {length: 1e6 * each / (0.1 * length) for length, each in spent.items()}


if __name__ == "__main__":
    main()
