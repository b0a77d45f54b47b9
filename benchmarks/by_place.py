"""How often drafts stand up to each place, where validation pairs are translated.

    python benchmarks/by_place.py MODEL… [--pairs corpora/translate/dev.jsonl] [--count 64]

Drafts of ``blt-s draft_bytes=16``, greedy, of pairs that are evenly spaced.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from blt_core import Pipeline
from blt_core.types import RoundCounts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--pairs", type=Path, default=Path("corpora/translate/dev.jsonl"))
    parser.add_argument("--count", type=int, default=64, help="pairs that are translated")
    parser.add_argument("--draft-bytes", type=int, default=16)
    options = parser.parse_args()
    pairs = [json.loads(line) for line in options.pairs.read_text().splitlines()]
    some = pairs[:: max(len(pairs) // options.count, 1)][: options.count]
    prompts = [f"{pair['language']}: {pair['source']}\nen:" for pair in some]
    sampler = {"use": "blt-s", "draft_bytes": options.draft_bytes}
    for model in options.models:
        tables = {"schema": 1, "run": {"checkpoint": model}, "sampler": sampler}
        found = Pipeline.from_config(tables).generate(prompts, max_new_bytes=300, stop="\n")
        counts = sum((each.counts for each in found), RoundCounts())
        print(f"{model}: {counts.bytes_per_round:.1f} bytes a round; drafts that stand up to place")
        for place, share in enumerate(counts.by_place, 1):
            print(f"  {place:>2}  {share:.0%}")


if __name__ == "__main__":
    main()
