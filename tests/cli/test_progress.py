"""How far work has come: lines in a log, the time left, and what a signal leaves."""

from __future__ import annotations

import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest

from blt_core.cli.progress import Line, item_progress, progress_bar
from blt_core.errors import RunError
from tests.forks import BLT, forks


class Clock:
    """One that is set; fulfils ``time.monotonic``."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_tells_the_time_left_from_the_speed_of_late():
    line, told = Line(0.0), {}
    for second in range(2000):
        # 400 items were there before; then 10 a second, after ten minutes 2 a second.
        done = 400 + min(second, 600) * 10 + max(second - 600, 0) * 2
        if (text := line.at(float(second), done, 20_000)) is not None:
            told[second] = text
    assert told[30] == "700 of 20,000 (3.5%), 10/s, 0:32:10 left"
    assert told[60] == "1,000 of 20,000 (5.0%), 10/s, 0:31:40 left"
    last = max(told)
    left = (20_000 - 400 - 6000 - (last - 600) * 2) // 2
    assert told[last].endswith(f" 2/s, {timedelta(seconds=left)} left")
    pauses = [b - a for a, b in zip([*told], [*told][1:], strict=False)]
    assert min(pauses) >= 30
    assert max(pauses) <= 2000 / 20 + 1
    assert Line(0.0).at(50.0, 0, 10) == "0 of 10 (0.0%), 0/s, –"


def test_a_log_gets_lines_where_a_terminal_has_a_bar(capsys):
    clock = Clock()
    with progress_bar(clock) as bar:
        task = bar.add_task("score", total=1000)
        for _ in range(60):
            clock.now += 1
            bar.update(task, advance=5)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "score: 150 of 1,000 (15.0%), 5/s, 0:02:50 left",
        "score: 300 of 1,000 (30.0%), 5/s, 0:02:20 left",
    ]


def test_a_bar_tells_the_time_left_of_batches_that_are_minutes_apart(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    clock = Clock()
    bar = progress_bar(clock)
    task = bar.add_task("generate", total=64)
    for _ in range(4):
        clock.now += 120
        bar.update(task, advance=8)
    assert bar.tasks[0].time_remaining == 4 * 120


@pytest.mark.parametrize(
    ("number", "command"),
    [
        (signal.SIGTERM, ("generate", "--max-new-bytes", "8", "--prompts")),
        (signal.SIGINT, ("score", "--texts")),
    ],
)
def test_a_signal_says_how_to_go_on_and_leaves_what_is_done(checkpoint, tmp_path, number, command):
    items, out = tmp_path / "items.jsonl", tmp_path / "out.jsonl"
    items.write_text((json.dumps({"prompt": "a", "text": "b" * 100}) + "\n") * 4000)
    partial, error = tmp_path / "out.jsonl.partial", tmp_path / "error"
    line = [*command, str(items), "--checkpoint", str(checkpoint), "--output", str(out)]
    with error.open("w") as said, Path(os.devnull).open("r+") as nothing:
        process = forks().start(BLT, line, streams=(nothing, nothing, said))
        while not partial.exists() or partial.read_bytes().count(b"\n") < 3:
            time.sleep(0.01)
        os.kill(process.pid, number)
        assert process.wait() == 1
    told = error.read_text().strip().splitlines()
    assert told[-1] == (
        f"interrupted; what is done is kept in {partial}: run the same command again to go on"
    )
    assert partial.read_bytes().count(b"\n") >= 3
    assert not out.exists()


def test_what_is_no_interruption_passes(tmp_path):
    with pytest.raises(RunError, match=r"^disk$"), item_progress("x", tmp_path):
        raise RunError("disk")
