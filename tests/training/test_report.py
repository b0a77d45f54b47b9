"""Reports: lines where there is no terminal, a bar where there is one, metrics that rewind."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import ClassVar

import pytest

from blt_core import hookspecs
from blt_core.errors import DataError, RunError
from blt_core.plugins.loading import load_plugins
from blt_plugins.training.run.metrics import Metrics
from blt_plugins.training.run.report import (
    BarReport,
    LineReport,
    ObservedReport,
    TrainStep,
    new_report,
)

FIGURES = {"loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "bytes_per_second": 2200.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(report) -> None:
    report.phase("model", 0, 30)
    for step in range(1, 31):
        report.step(step, FIGURES)
    report.note("[bold]done[/]")
    report.close()


def test_lines_are_few_and_show_the_last_step():
    stream = io.StringIO()
    run(LineReport(stream, seconds=3600))
    first, last, note = stream.getvalue().splitlines()
    assert "model 1/30  loss 2.5000  lr 1.00e-03  norm 0.50  2.20 kB/s" in first
    assert "model 30/30" in last
    assert last.endswith("left 0:00:00")
    assert note.endswith("[bold]done[/]")
    stream = io.StringIO()
    run(LineReport(stream, seconds=0))
    assert len(stream.getvalue().splitlines()) == 31


def test_a_bar_is_for_terminals_only():
    assert isinstance(new_report(io.StringIO()), LineReport)
    stream = Terminal()
    report = new_report(stream)
    assert isinstance(report, BarReport)
    run(report)
    assert "30/30" in stream.getvalue()
    assert "[bold]done[/]" in stream.getvalue()


def test_observers_are_told_of_each_step():
    class Observer:
        steps: ClassVar[list] = []

        @hookspecs.hookimpl
        def blt_run_step(self, run, step):
            self.steps.append((run, step))

    plugins = load_plugins(extra=[("test", "observer", Observer())])
    run(ObservedReport(LineReport(io.StringIO()), plugins.notify, "the run"))
    assert len(Observer.steps) == 30
    assert Observer.steps[4] == ("the run", TrainStep("model", 5, FIGURES))


def test_metrics_forget_what_will_be_logged_again(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.rewind({})  # nothing there yet
    for phase, steps in (("scorer", 3), ("model", 4)):
        for step in range(1, steps + 1):
            metrics.write(phase=phase, step=step, loss=0.5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "model", "st')  # killed while it wrote
    metrics.rewind({"scorer": 3, "model": 2})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [(r["phase"], r["step"]) for r in map(json.loads, lines)] == [
        ("scorer", 1), ("scorer", 2), ("scorer", 3), ("model", 1), ("model", 2),
    ]  # fmt: skip
    metrics.rewind({})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "line", ['{"loss": 1.0}', '{"step": "a", "phase": "model"}', "5", "{cut", "[" * 100_000]
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, line):
    text = f'{{"phase": "model", "step": 1}}\n{line}\n{{"phase": "model", "step": 1}}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: no record of a training run: "):
        Metrics(tmp_path / "metrics.jsonl").rewind({"model": 3})
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_metrics_that_an_editor_gave_a_byte_order_mark_are_read(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_bytes(b'\xef\xbb\xbf{"phase": "model", "step": 1}\r\n')
    assert metrics.read() == [{"phase": "model", "step": 1}]
    metrics.rewind({"model": 3})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"phase": "model", "step": 1}\n'


def test_a_file_of_one_line_of_something_else_is_refused_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("my notes")
    with pytest.raises(DataError, match="my notes"):
        Metrics(tmp_path / "metrics.jsonl").rewind({})
    assert (tmp_path / "metrics.jsonl").read_text() == "my notes"


def test_metrics_that_cannot_be_read_or_written_are_told_with_their_path(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}: Is a directory"):
        Metrics(tmp_path).rewind({})
    with pytest.raises(RunError, match="/dev/full: No space left on device"):
        Metrics(Path("/dev/full")).write(phase="model", step=1)
