"""What a run leaves to look at: ``metrics.jsonl``, TensorBoard's events, a plot of the losses."""

from __future__ import annotations

import importlib.util
import json
import math
from codecs import BOM_UTF8
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blt_core.errors import DataError, RunError
from blt_core.files import parse_json
from blt_core.storage.folders import file_errors

#: How every line of the metrics begins.
_BEGINNING = b'{"phase": '
#: Bytes of a line that a message shows.
_SHOWN = 60


class Metrics:
    """``metrics.jsonl``: one JSON object a line, each with ``phase`` and ``step``.

    tensorboard: a folder for events of the same figures, written where TensorBoard is installed.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None) -> None:
        self.path = path
        wanted = tensorboard is not None and importlib.util.find_spec("tensorboard") is not None
        self._events = tensorboard if wanted else None
        self._writer: Any = None

    def write(self, *, phase: str, step: int, **record: Any) -> None:
        """Append a record; RunError if it cannot be written.

        A number that is not finite is written as null, for JSON has no word for it.
        """
        record = {name: _finite(value) for name, value in record.items()}
        line = json.dumps({"phase": phase, "step": step, **record}, allow_nan=False)
        with file_errors(self.path, RunError):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._write_events(phase, step, record)

    def rewind(self, keep: Mapping[str, int], unscored: tuple[str, int] | None = None) -> None:
        """Keep the records of each phase up to its step in ``keep``, those of others not at all.

        What a run logged after its last saved state will be logged again; so will the scores of
        ``unscored``, the phase and step of a state that was saved without them. Raises DataError,
        and changes nothing, if the file holds anything else than such records.
        """
        self.close()
        with file_errors(self.path, DataError):
            if not self.path.exists():
                return
            lines = self._lines()
            if lines and _is_cut(lines[-1]):
                lines.pop()
            kept = [
                line for n, line in enumerate(lines, 1) if self._is_kept(n, line, keep, unscored)
            ]
            fresh = self.path.with_name(f".{self.path.name}.new")
            fresh.write_bytes(b"".join(line + b"\n" for line in kept))
            fresh.replace(self.path)
            self._rewrite_events(kept)

    def read(self) -> list[dict[str, Any]]:
        """All records. Raises DataError for a line that is none."""
        with file_errors(self.path, RunError):
            lines = self._lines() if self.path.exists() else []
        return [self._record(number, line) for number, line in enumerate(lines, start=1)]

    def close(self) -> None:
        """Write the events out."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write_events(self, phase: str, step: int, record: Mapping[str, Any]) -> None:
        if self._events is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._events))
        for name, value in record.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"{phase}/{name}", value, step)

    def _rewrite_events(self, lines: list[bytes]) -> None:
        """Events cannot be cut back: those of the kept records are written anew."""
        if self._events is None:
            return
        for path in self._events.glob("events.out.tfevents.*"):
            path.unlink()
        for line in lines:
            record = json.loads(line)
            self._write_events(record.pop("phase"), record.pop("step"), record)

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().removeprefix(BOM_UTF8).splitlines()

    def _is_kept(
        self,
        number: int,
        line: bytes,
        keep: Mapping[str, int],
        unscored: tuple[str, int] | None,
    ) -> bool:
        record = self._record(number, line)
        phase, step = record["phase"], record["step"]
        lapsed = (phase, step) == unscored and "loss" not in record
        return bool(step <= keep.get(phase, -1)) and not lapsed

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        """The record of a line, which is counted from 1."""
        try:
            record = parse_json(line)
            if isinstance(record["step"], int) and isinstance(record["phase"], str):
                return dict(record)
        except (ValueError, KeyError, TypeError):
            pass
        shown = line[:_SHOWN].decode(errors="replace")
        raise DataError(
            f"{self.path}:{number}: no record of a training run: {shown}\n"
            "  fix: move the file away, or choose another --out"
        )


def _finite(value: Any) -> Any:
    """A figure, or None in the place of a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_cut(line: bytes) -> bool:
    """Whether a record was cut off in the middle of a write."""
    try:
        parse_json(line)
    except ValueError:
        return _BEGINNING.startswith(line[: len(_BEGINNING)])
    return False


def plot_losses(metrics: Metrics, path: Path) -> bool:
    """Draw losses and held-out scores over the bytes of steps; whether matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    records = metrics.read()
    phases = list(dict.fromkeys(r["phase"] for r in records if "loss" in r))
    figure = Figure(figsize=(5.5 * max(len(phases), 1), 4), layout="constrained")
    for place, phase in enumerate(phases):
        own = [r for r in records if r["phase"] == phase]
        axes = figure.add_subplot(1, len(phases), place + 1, title=phase, xlabel="step")
        names = [n for n in dict.fromkeys(k for r in own for k in r) if n.endswith("loss")]
        for name in names:
            points = [(r["step"], r[name]) for r in own if r.get(name) is not None]
            axes.plot(*zip(*points, strict=True), linewidth=0.8, label=name)
        axes.set_ylabel("nats a byte")
        scores = [
            (r["step"], r["bits_per_byte"]) for r in own if r.get("bits_per_byte") is not None
        ]
        if scores:
            other = axes.twinx()
            other.plot(*zip(*scores, strict=True), "o-", color="black", label="held out")
            other.set_ylabel("held-out bits per byte")
        axes.legend(loc="upper right")
    with file_errors(path, RunError):
        fresh = path.with_name(f".new-{path.name}")
        figure.savefig(fresh, dpi=120)
        fresh.replace(path)
    return True
