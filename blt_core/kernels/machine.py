"""What decides which kernel is fastest: the CPU, torch, and its threads."""

from __future__ import annotations

import functools
import hashlib
import platform
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import torch

_LAST_LEVEL = Path("/sys/devices/system/cpu/cpu0/cache")
#: Taken where the system does not tell how large the last-level cache is.
_LARGE = 64 << 20
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@attrs.frozen
class Machine:
    """cpu: its model. flags: a hash of what it can do. torch: the version. threads: of torch."""

    cpu: str
    flags: str
    torch: str
    threads: int


def machine() -> Machine:
    """This machine, with the threads that torch uses now."""
    cpu, flags = _cpu()
    return Machine(cpu, flags, torch.__version__, torch.get_num_threads())


@functools.cache
def _cpu() -> tuple[str, str]:
    """The CPU's model, and a hash of its flags."""
    told: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0].splitlines()
        told = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    except OSError:
        pass  # not Linux
    model = told.get("model name") or platform.processor() or platform.machine()
    numbers = [told.get(key, "") for key in ("cpu family", "model", "stepping")]
    flags = sorted((told.get("flags") or told.get("Features", "")).split())
    can = f"{numbers} {flags} {torch.backends.cpu.get_cpu_capability()}"
    return model, hashlib.sha256(can.encode()).hexdigest()[:16]


@functools.cache
def last_level_cache() -> int:
    """Bytes of the largest cache of this CPU."""
    sizes = [_LARGE] if not _LAST_LEVEL.exists() else []
    for path in _LAST_LEVEL.glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit() and text[-1] in _UNITS:
            sizes.append(int(text[:-1]) * _UNITS[text[-1]])
    return max(sizes, default=_LARGE)


def read_bandwidth(size: int = 1 << 30) -> float:
    """GB/s of the best of five sums over ``size`` bytes of memory, with torch's threads."""
    data = torch.ones(size // 8, dtype=torch.int64)
    return data.nbytes / min(seconds(data.sum) for _ in range(5)) / 1e9


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
