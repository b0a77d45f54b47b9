"""What every patcher shares: the maximum patch length, and remembering what rewinds need.

A rule that sees no patches, only bytes, leaves flags in a closed form: ``limited``. Others are
asked byte by byte: ``scan``. Axes: b batch rows, r new byte rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from blt_core.errors import EngineError
from blt_core.protocols import Cache, ReorderingCache, can_reorder
from blt_core.types import Rows

State = TypeVar("State")
#: After byte i: (bytes in its patch so far, a mark of the rule's own, flag i + 1).
PatchState = tuple[int, int, bool]
#: wants(b, i, id, size, mark) -> (does the rule open a patch at byte i + 1?, the new mark).
#: ``size`` counts the open patch up to byte i; ``mark`` is 0 where a patch opens.
Rule = Callable[[int, int, int, int, int], tuple[bool, int]]


class PatchHistory(Generic[State]):
    """The state after each byte of each batch row, so that a rewind is a cut.

    ``inner`` is a cache that follows (the byte scorer's).
    """

    def __init__(self, batch: int, inner: Cache | None = None) -> None:
        self.states: list[list[State]] = [[] for _ in range(batch)]
        self.inner = inner
        self._settled = [0] * batch

    @property
    def lengths(self) -> Sequence[int]:
        """Bytes read, per batch row."""
        return [len(row) for row in self.states]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget the bytes after ``lengths``. Raises EngineError below a settled length."""
        for row, length in enumerate(lengths):
            if length < self._settled[row]:
                raise EngineError(f"batch row {row}: cannot rewind the patcher to {length}")
            del self.states[row][length:]
        if self.inner is not None:
            self.inner.rewind(lengths)

    def settle(self, lengths: Sequence[int]) -> None:
        """Promise never to rewind below ``lengths``."""
        for row, length in enumerate(lengths):
            self._settled[row] = max(self._settled[row], min(length, len(self.states[row])))
        if self.inner is not None:
            self.inner.settle(lengths)

    def reorder(self, rows: Sequence[int]) -> None:
        """Batch row b becomes a copy of what row ``rows[b]`` was."""
        self.states = [list(self.states[row]) for row in rows]
        self._settled = [self._settled[row] for row in rows]
        if isinstance(self.inner, ReorderingCache):
            self.inner.reorder(rows)

    @property
    def reorders(self) -> bool:
        """Whether the inner cache can do so too."""
        return self.inner is None or can_reorder(self.inner)


def limited(
    rows: Rows, history: PatchHistory[int] | None, opens_br: Tensor | None, limit: int | None
) -> Tensor:
    """Flags (b, r) of the new bytes: where a rule opens a patch, after BOS, where one is full.

    opens_br: where the rule opens one, whatever the patches are (None: nowhere); ``limit``: most
    bytes of a patch. With a history, which keeps how many bytes ago the rule last opened one, the
    flags are on the CPU. From there on patches are full after each ``limit`` bytes.
    """
    ids_br = rows.ids_br
    if opens_br is None:
        device = ids_br.device if history is None else "cpu"
        opens_br = torch.zeros(ids_br.shape, dtype=torch.bool, device=device)
    if history is None:
        begun = torch.zeros(len(ids_br), dtype=torch.long, device=ids_br.device)
        since_br = _since(opens_br, begun)
    elif opens_br.numel() == 1 and rows.lengths == (1,) and history.states[0]:
        since = 0 if opens_br.item() else history.states[0][-1] + 1
        history.states[0].append(since)
        return torch.tensor([[since == 0 or (limit is not None and since % limit == 0)]])
    else:
        begun = torch.tensor([past[-1] + 1 if past else 0 for past in history.states])
        since_br = _since(opens_br.cpu(), begun)
        for b, (since, count) in enumerate(zip(since_br.tolist(), rows.lengths, strict=True)):
            history.states[b] += since[:count]
    return since_br == 0 if limit is None else since_br % limit == 0


def _since(opens_br: Tensor, begun_b: Tensor) -> Tensor:
    """(b, r): how many bytes ago one opened, at the new bytes; ``begun_b`` at the first if none."""
    at = torch.arange(opens_br.shape[1], device=opens_br.device)
    last = torch.where(opens_br, at, -begun_b[:, None])
    return at - last.cummax(1).values


def scan(
    rows: Rows, history: PatchHistory[PatchState] | None, max_patch_bytes: int | None, wants: Rule
) -> Tensor:
    """Flags (b, r) of the new bytes: set by the rule, after BOS, and where a patch is full.

    With a history they are on the CPU, where they were found.
    """
    ids = rows.ids_br.tolist()
    flags = [[False] * rows.ids_br.shape[1] for _ in rows.lengths]
    for b, count in enumerate(rows.lengths):
        past: list[PatchState] = history.states[b] if history is not None else []
        size, mark, opens = past[-1] if past else (0, 0, True)
        first = not past
        for i in range(count):
            size, mark = (1, 0) if opens else (size + 1, mark)
            opens, mark = wants(b, i, ids[b][i], size, mark)
            opens = opens or first or size == max_patch_bytes
            first = False
            flags[b][i] = opens
            past.append((size, mark, opens))
    found = torch.tensor(flags, dtype=torch.bool)
    return found if history is not None else found.to(rows.ids_br.device)
