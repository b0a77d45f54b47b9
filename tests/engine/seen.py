"""The situations that the properties of the engine met; a run of this folder demands them all."""

from __future__ import annotations

from collections import Counter

SEEN: Counter[str] = Counter()

DEMANDED = (
    "accepted none",
    "accepted some",
    "accepted all",
    "sampled draft accepted none",
    "sampled draft accepted some",
    "sampled draft accepted all",
    "patch of one byte",
    "patch of the maximum",
    "closed by the bonus byte",
    "closed only in the rejected part",
    "aligned block",
    "aligned fallback",
    "aligned and fallback in one batch",
    "forced block",
    "forced block where the flag is known",
    "forced block, scored first",
    "unclosed block",
    "EOS inside a draft",
    "EOS accepted",
    "stop string inside an accepted draft",
    "rows finish in different rounds",
    "ended by length",
    "ended by EOS",
    "ended by a stop string",
    "special id output",
    "empty prompt",
    "prompt of one byte",
    "prompt of invalid UTF-8",
    "prompt with NUL",
    "prompt longer than a window",
    "a ring longer than usual",
    "a prompt longer than a ring",
    "a rewind by more than a ring holds",
    "a block whose window lies across the end of a ring",
    "rows for two rings at once",
    "batch of unequal prompts",
    "patcher entropy",
    "patcher static",
    "patcher space",
    "decoder reads byte states",
    "a pass of one row as it is compiled",
    "a pass of a draft as it is compiled",
    "a pass of a batch as it is compiled",
    "a pass of a block as it is compiled",
    "a pass of blocks of a batch as it is compiled",
    "a pass that was captured",
    "rewind inside a patch",
    "rewind to a boundary",
    "rows asked for again",
    "row idle for several passes",
    "rows read once for several",
    "stopped draft",
    "a draft that some rows take no part in",
    "a draft of unequal lengths",
    "EOS ends a draft before its limit",
    "EOS in a draft that is read late",
    "a sampled draft that is read late",
    "a tensor for each pass",
    *(f"draft of {length}" for length in range(1, 17)),
)


def saw(situation: str, happened: object = True) -> None:  # noqa: FBT002 -- reads as a sentence
    """Count ``situation`` if it happened."""
    if happened:
        SEEN[situation] += 1
