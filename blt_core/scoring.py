"""How likely texts are to a model: the log-probability of each byte, and of the end.

A text's *targets* are its bytes and EOS. A text that is longer than the model's context is cut into
windows of as many targets, each read from BOS on, as held-out scores are: sums over the targets are
what ``blt evaluate`` counts. A prompt stands before the first window, as much of its end as fits.
Axes: b batch rows, r byte rows, V ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from blt_core.errors import RunError
from blt_core.likelihood import Likelihood, likelihoods
from blt_core.model import Model
from blt_core.types import Rows

#: Rows that one pass runs, padding included; only memory limits it.
BATCH_ROWS = 16384


@attrs.frozen
class Score:
    """How likely ``text`` is after ``prompt``.

    likelihoods: one for each byte of the text. eos: that of EOS after them.
    """

    prompt: bytes
    text: bytes
    likelihoods: tuple[Likelihood, ...]
    eos: Likelihood

    @property
    def logprob(self) -> float:
        """Of all bytes and EOS, in nats."""
        return math.fsum((*(each.logprob for each in self.likelihoods), self.eos.logprob))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits to code the bytes and EOS, by the number of bytes (None without any)."""
        return -self.logprob / math.log(2) / len(self.text) if self.text else None

    @property
    def bits_per_byte_without_eos(self) -> float | None:
        """The same of the bytes alone."""
        nats = math.fsum(each.logprob for each in self.likelihoods)
        return -nats / math.log(2) / len(self.text) if self.text else None

    def to_dict(self) -> dict[str, Any]:
        """The stable record of ``blt score --json``; docs/cli.md says what its fields mean."""
        return {
            "bytes": len(self.text),
            "logprob": self.logprob,
            "eos_logprob": self.eos.logprob,
            "bits_per_byte": self.bits_per_byte,
            "bits_per_byte_without_eos": self.bits_per_byte_without_eos,
            "logprobs": [each.logprob for each in self.likelihoods],
            "top_logprobs": [[list(pair) for pair in each.top] for each in self.likelihoods],
        }


@attrs.frozen
class _Window:
    """Ids that are read from BOS on, of which all but the first ``given`` are targets of a text."""

    number: int
    ids: tuple[int, ...]
    given: int = 0


@torch.inference_mode()
def score(model: Model, pairs: Sequence[tuple[bytes, bytes]], *, top: int = 0) -> list[Score]:
    """A score for each (prompt, text), where the prompt may be empty.

    top: likeliest ids to tell at each place. Raises RunError if the model gives no numbers.
    """
    found: list[list[Likelihood]] = [[] for _ in pairs]
    windows = [
        window
        for number, (prompt, text) in enumerate(pairs)
        for window in _windows(model, number, prompt, text)
    ]
    for group in _groups(windows):
        logits = _logits(model, [window.ids for window in group])
        for window, own in zip(group, logits, strict=True):
            rows, targets = own[window.given : len(window.ids)], window.ids[window.given :]
            found[window.number] += likelihoods(rows, targets, top)
    return [
        Score(prompt, text, tuple(of[:-1]), of[-1])
        for (prompt, text), of in zip(pairs, found, strict=True)
    ]


def _windows(model: Model, number: int, prompt: bytes, text: bytes) -> Iterator[_Window]:
    scheme, most = model.scheme, model.context_bytes
    targets = [*scheme.encode(text), scheme.eos]
    first = targets[:most]
    given = scheme.encode(prompt)[-(most - len(first)) :] if len(first) < most else []
    yield _Window(number, (*given, *first), len(given))
    for start in range(most, len(targets), most):
        yield _Window(number, tuple(targets[start : start + most]))


def _groups(windows: Sequence[_Window]) -> Iterator[list[_Window]]:
    """Windows in batches of similar length; each text's windows stay in order."""
    group: list[_Window] = []
    # Longest first, so that lack of memory shows at once; a stable sort keeps a text's order.
    for window in sorted(windows, key=lambda each: -len(each.ids)):
        if group and (len(group) + 1) * len(group[0].ids) > BATCH_ROWS:
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def _logits(model: Model, texts: Sequence[Sequence[int]]) -> Tensor:
    """(b, r, V): of the targets ``texts``, whose rows are BOS and all of them but the last."""
    width = max(map(len, texts))
    rows = [[model.scheme.bos, *ids[:-1]] + [0] * (width - len(ids)) for ids in texts]
    given = Rows(torch.tensor(rows, device=model.device), tuple(map(len, texts)))
    output = model.forward(given, model.patcher.flags(given, None)).clean
    if output is None:
        raise RunError("the decoder gave no output for its clean rows")
    for ids, own in zip(texts, output.logits, strict=True):
        if bool(own[: len(ids)].isnan().any()):
            raise RunError("the model's logits are no numbers: its weights are damaged")
    return output.logits
