"""Processes that are threads of one, and reduce as those of a training backend do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import attrs

SECONDS = 60


class Group:
    """Processes that reduce as a backend does, and can be waited for."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.meeting = threading.Barrier(world_size, timeout=SECONDS)
        self.values: dict[int, list[float]] = {}

    def run(self, work: Callable[[Any], Any]) -> list[Any]:
        """What each process returns or raises."""
        found: dict[int, Any] = {}

        def one(rank: int) -> None:
            try:
                found[rank] = work(Member(self, rank))
            except Exception as error:  # noqa: BLE001 -- returned
                found[rank] = error

        threads = [
            threading.Thread(target=one, args=(rank,), name=f"rank {rank}")
            for rank in range(self.world_size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        return [found[rank] for rank in range(self.world_size)]


@attrs.frozen
class Member:
    """The part of a training backend by which processes agree."""

    group: Group
    rank: int

    @property
    def world_size(self) -> int:
        return self.group.world_size

    def mean(self, values: Sequence[float]) -> list[float]:
        group = self.group
        group.values[self.rank] = list(values)
        group.meeting.wait()
        ordered = [group.values[rank] for rank in range(group.world_size)]
        group.meeting.wait()
        assert len({len(each) for each in ordered}) == 1, "processes reduce different things"
        return [sum(each) / group.world_size for each in zip(*ordered, strict=True)]
