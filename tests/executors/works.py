"""The commands whose work an executor does, on tiny inputs, and workers that are killed at it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blt_core.cli.app import run

ITEMS = 10
#: What a clock says, and nothing else.
TIMES = {"prefill_seconds", "seconds", "bytes_per_second"}


def blt(*arguments: object) -> str:
    """What a command line prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = run([str(argument) for argument in arguments])
    assert code == 0, arguments
    return printed.getvalue()


def _lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _untimed(found: Any) -> Any:
    if isinstance(found, Mapping):
        return {key: _untimed(value) for key, value in found.items() if key not in TIMES}
    return [_untimed(each) for each in found] if isinstance(found, list) else found


def _records(path: Path) -> list[Any]:
    return [_untimed(json.loads(line)) for line in path.read_text().splitlines()]


def generate(model: Path, folder: Path, *executor: str) -> Any:
    """Records of many prompts."""
    texts = [{"prompt": f"item {n} " * (n % 5)} for n in range(ITEMS)]
    prompts, out = _lines(folder / "prompts", texts), folder / "generated"
    blt(
        "generate", "--checkpoint", model, "--dtype", "float64", "--prompts", prompts,
        "--output", out, "--batch", 2, "--max-new-bytes", 12, "--temperature", 1, *executor,
    )  # fmt: skip
    return _records(out)


def score(model: Path, folder: Path, *executor: str) -> Any:
    """The scores of many texts, as written."""
    records = [{"text": f"text {n} " * (n % 5), "prompt": "p"} for n in range(ITEMS)]
    texts, out = _lines(folder / "texts", records), folder / "scored"
    blt(
        "score", "--checkpoint", model, "--dtype", "float64", "--texts", texts, "--output", out,
        "--batch", 2, "--top", 1, *executor,
    )  # fmt: skip
    return out.read_bytes()


def evaluate(model: Path, folder: Path, *executor: str) -> Any:
    """Scores and costs of a task, and the answers that are kept."""
    records = [{"source": f"Zeile {n}", "target": f"row {n}"} for n in range(ITEMS // 2)]
    pairs, out = _lines(folder / "pairs", records), folder / "answers"
    printed = blt(
        "evaluate", model, "--dtype", "float64", "--task",
        f"translation pairs={pairs} max_new_bytes=12", "--sampler", "blt-s draft_bytes=2",
        "--batch", 1, "--out", out, "--json", *executor,
    )  # fmt: skip
    kept = {file.name: sorted(_records(file), key=json.dumps) for file in out.rglob("*.jsonl")}
    [task] = json.loads(printed)["tasks"]
    return _untimed({**task, "data": None}), kept


def prepare(model: Path, folder: Path, *executor: str) -> Any:
    """The files of a prepared corpus."""
    corpus, out = folder / "corpus", folder / "prepared"
    corpus.mkdir()
    for n in range(ITEMS):
        (corpus / f"{n}.txt").write_text(f"document {n}. " * (20 + n))
    blt("prepare", model, "--corpus", corpus, "--out", out, "--shard-bytes", 300, *executor)
    return {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}


WORKS: dict[str, Callable[..., Any]] = {
    each.__name__: each for each in (prepare, score, evaluate, generate)
}


def interrupted(monkeypatch, workers: type, lose: Callable[[Any, int], bool]) -> list[int]:
    """Have ``lose(workers, results so far)`` called after each result while there is work.

    It says whether it has lost something; the list tells, for each loss, the tasks then left.
    """
    run_tasks, lost = workers.run, []  # type: ignore[attr-defined]

    def watched(self, tasks, watch=None):
        tasks = list(tasks)
        for count, found in enumerate(run_tasks(self, iter(tasks), watch), 1):
            if count < len(tasks) - 1 and lose(self, count):
                lost.append(len(tasks) - count)
            yield found

    monkeypatch.setattr(workers, "run", watched)
    return lost
