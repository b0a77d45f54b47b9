"""Random programs of decode operations on a model, each result held to the plain reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from blt_core.decoding.state import DecodeState
from blt_core.model import Model
from blt_core.testing.contracts import Broken
from blt_core.testing.reference import block_logits, row_logits, true_flags
from blt_core.testing.sequences import TOLERANCE, far
from blt_core.types import Draws, Sampling

#: Bytes of the texts: words, signs and bytes beyond ASCII.
ALPHABET = b"ab 1(\n\xe9\x00"
#: Bytes that a text may grow by in a program; more are not appended.
ROOM = 90

Step = tuple[str, list[int]]


def denoises(model: Model) -> bool:
    """Whether a model's decoder fills blocks."""
    return bool(model.decoder.denoises) and model.scheme.mask is not None


def programs(*, denoises: bool) -> st.SearchStrategy[list[Step]]:
    """What is done with a batch of two texts; two numbers say the details of each operation."""
    names = ["append", "append", "next", "next", "draft", "write", "rewind", "settle"]
    names += ["block"] * 2 if denoises else []
    step = st.tuples(st.sampled_from(names), st.lists(st.integers(0, 4095), min_size=2, max_size=2))
    return st.lists(step, min_size=2, max_size=12)


def follow(model: Model, steps: Sequence[Step]) -> None:
    """Run a program; Broken at the first result that differs from the reference's."""
    Program(model).run(steps)


class Program:
    """A decode state of two texts, and beside it what is known of their flags."""

    def __init__(self, model: Model) -> None:
        self.model = model
        prompts = [[97, 32, 98], [*b"ab1 (ab)\n ab1 (ab)\n b"]]
        self.state = DecodeState(model, prompts, [1000, 1000])
        self.texts = [[model.scheme.bos, *ids] for ids in prompts]
        self.known = [0, 0]
        self.prompts = [len(text) for text in self.texts]
        self.settled = [0, 0]
        self._true: dict[tuple[int, ...], list[bool]] = {}

    def run(self, steps: Sequence[Step]) -> None:
        """All operations; a first pass reads the prompts, and settles the patches they end in."""
        self.next([1, 1])
        self.settle([])
        for name, numbers in steps:
            getattr(self, name)(numbers)
            for row, text in enumerate(self.texts):
                if self.state.text(row) != text:
                    raise Broken(f"after {name} the engine has another text")

    # -- operations ------------------------------------------------------------------------------

    def append(self, numbers: Sequence[int]) -> None:
        """One to four bytes for each text."""
        new = [
            [ALPHABET[(number >> (3 * i)) % len(ALPHABET)] for i in range(1 + number % 4)]
            if len(text) < ROOM
            else []
            for number, text in zip(numbers, self.texts, strict=True)
        ]
        self.state.append(new)
        for text, ids in zip(self.texts, new, strict=True):
            text.extend(ids)

    def rewind(self, numbers: Sequence[int]) -> None:
        """By up to seven bytes, not into what is settled, nor into the prompt."""
        lengths = [
            max(len(text) - number % 8, kept + 1, prompt)
            for text, number, kept, prompt in zip(
                self.texts, numbers, self.settled, self.prompts, strict=True
            )
        ]
        self.state.rewind(lengths)
        for row, length in enumerate(lengths):
            del self.texts[row][length:]
            self.known[row] = min(self.known[row], length)

    def settle(self, _: Sequence[int]) -> None:
        """No rewind goes into patches that have ended, from now on."""
        self.state.settle()
        for row in range(len(self.texts)):
            opened = [i for i, flag in enumerate(self._flags(row)[:-1]) if flag]
            self.settled[row] = max(self.settled[row], opened[-1])

    def next(self, numbers: Sequence[int]) -> None:
        """A true pass."""
        rows = self._asked(numbers)
        got = self.state.next_logits(rows)
        for row, count in enumerate(rows):
            if count:
                self.known[row] = len(self.texts[row])
                self._hold("next_logits", row, got[row, :count])

    def draft(self, numbers: Sequence[int]) -> None:
        """A pass of the decoder alone."""
        rows = self._asked(numbers)
        got = self.state.draft_logits(rows)
        for row, count in enumerate(rows):
            if count:
                self._hold("draft_logits", row, got[row, :count])

    def write(self, numbers: Sequence[int]) -> None:
        """Up to four ids that the decoder alone finds likeliest, or up to an EOS."""
        limits = [
            min(number % 5, max(ROOM - len(text), 0))
            for number, text in zip(numbers, self.texts, strict=True)
        ]
        banned = list(self.model.scheme.never_output)
        written = self.state.draft(limits, Sampling(), Draws((0,) * len(limits)))
        for row, (text, new) in enumerate(zip(self.texts, written, strict=True)):
            text.extend(new)
            if new:
                at = len(text) - len(new) - 1
                want = row_logits(self.model, text, self._flags(row))[at:-1]
                want = want.index_fill(-1, torch.tensor(banned), float("-inf"))
                chosen = want[torch.arange(len(new)), torch.tensor(new)]
                if far(chosen, want.amax(-1)) > TOLERANCE:
                    raise Broken(f"draft chose ids for batch row {row} that are not the likeliest")

    def block(self, numbers: Sequence[int]) -> None:
        """A block, denoised twice with changing content."""
        first, second = numbers
        start, closure = (("aligned", "none"), ("frontier", "forced"), ("frontier", "none"))[
            first % 3
        ]
        size, mask = 1 + second % 6, self.model.scheme.mask
        block = self.state.open_block(size, start=start, closure=closure)  # type: ignore[arg-type]
        for turn in range(2):
            # In the second pass some texts may take no part.
            active = [turn == 0 or (first + row) % 4 > 0 for row in range(len(self.texts))]
            if not any(active):
                break
            got = self.state.denoise(block, active)
            for row, text in enumerate(self.texts):
                if not active[row]:
                    continue
                flags = self._flags(row)
                if block.provisional:
                    flags = [*flags[:-1], True]
                want = block_logits(self.model, text, flags, block.ids[row], block.start[row])
                self._agree(f"a block ({start}, {closure})", row, got[row], want)
            for ids, given in zip(block.ids, block.given, strict=True):
                for j in range(given, len(ids)):
                    if ids[j] == mask and (second >> (j + turn)) % 2:
                        ids[j] = ALPHABET[(first + j) % len(ALPHABET)]

    # -- what the reference says -----------------------------------------------------------------

    def _asked(self, numbers: Sequence[int]) -> list[int]:
        """How many rows each text is asked for: one to three; one text may take no part."""
        rows = [
            1 + number % min(len(text) - kept, 3)
            for number, text, kept in zip(numbers, self.texts, self.settled, strict=True)
        ]
        idle = [number % 11 == 0 for number in numbers]
        return rows if all(idle) else [0 if i else n for i, n in zip(idle, rows, strict=True)]

    def _flags(self, row: int) -> list[bool]:
        """Flags 0 to n of a text, those that are not known cleared."""
        text, known = tuple(self.texts[row]), self.known[row]
        if text not in self._true:
            self._true[text] = true_flags(self.model, text)
        return self._true[text][: known + 1] + [False] * (len(text) - known)

    def _hold(self, what: str, row: int, got: Tensor) -> None:
        text = self.texts[row]
        want = row_logits(self.model, text, self._flags(row))[len(text) - len(got) :]
        self._agree(what, row, got, want)

    def _agree(self, what: str, row: int, got: Tensor, want: Tensor) -> None:
        banned = list(self.model.scheme.never_output)
        kept = [i for i in range(want.shape[-1]) if i not in banned]
        apart: Any = far(got[..., kept], want[..., kept])
        if apart > TOLERANCE:
            raise Broken(f"{what} of batch row {row} is {apart:.2g} from what the whole text gives")
        if not bool(torch.isneginf(got[..., banned]).all()):
            raise Broken(f"{what} of batch row {row} gives ids that are never output a chance")
