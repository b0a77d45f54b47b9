"""How long training waits for its corpus: when it is read for the first time, and with its index.

Each start is a process of its own, timed within it from the search for files to the digest; CPU
seconds are of that process alone. Whole runs are timed from outside, imports and all: four steps of
a tiny model over the lines, and over a few of them for what does not depend on the corpus. Texts
are written in a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

#: Seconds after which files count as unchanged by their times.
SETTLED = 2.5
FILES_A_FOLDER = 1000
FEW_LINES = 100
#: Of a run over lines; ``shuffle_bytes`` is the default.
CONFIG = """
schema = 1
[corpus]
use = "jsonl"
path = "{path}"
valid_percent = {valid_percent}
[train]
steps = 4
batch_bytes = 4096
valid_bytes = 4000
valid_drafts = 0
context_bytes = 512
[model]
context_bytes = 512
[patcher]
use = "static"
patch_bytes = 4
[encoder]
use = "local"
dim = 32
heads = 2
hidden = 64
latent_dim = 48
ngram_sizes = [3]
ngram_rows = 101
window = 64
[global_model]
use = "transformer"
latent_dim = 48
layers = 1
heads = 2
hidden = 64
[decoder]
use = "local"
dim = 32
heads = 2
hidden = 64
latent_dim = 48
layers = 1
window = 64
"""


def write_lines(folder: Path, documents: int, size: int) -> None:
    """Eight JSON Lines files of documents of about ``size`` bytes."""
    for number in range(8):
        with (folder / f"{number}.jsonl").open("w") as file:
            for index in range(number, documents, 8):
                words = f"document {index} " + f"line {index % 977} of some text\n" * (size // 24)
                file.write(json.dumps({"id": index, "text": words[:size]}) + "\n")


def write_files(folder: Path, documents: int) -> None:
    """Files of some 30 bytes, a thousand in a folder."""
    for index in range(documents):
        below = folder / f"d{index // FILES_A_FOLDER:04}"
        if index % FILES_A_FOLDER == 0:
            below.mkdir()
        (below / f"file{index:07}.py").write_text(f"def name{index}(x):\n    return x\n")


def start(use: str, path: str, check: str, workers: int) -> None:
    """Open a corpus as a run does, and print its figures as JSON."""
    from blt_core.component import BuildContext
    from blt_core.plugins.loading import load_plugins
    from blt_core.wiring.resolve import build_node, resolve_component
    from blt_plugins.training.corpora import indexing

    if workers:
        indexing._cpus = lambda: workers  # noqa: SLF001 -- what there is of CPUs
    plugins = load_plugins()
    table = {"use": use, "path": path, "check": check}
    node = resolve_component("corpus", table, plugins)  # what is slow to import is imported now
    began, spent = time.perf_counter(), time.process_time()
    corpus = build_node(node, BuildContext(), plugins.registry)
    found = corpus.documents("train")
    figures = {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - spent,
        "documents": len(found) + len(corpus.documents("valid")),
        "digest": found.digest,
    }
    print(json.dumps(figures))


def run(*arguments: object) -> dict[str, float]:
    """The figures of ``start`` in a process of its own."""
    command = [sys.executable, __file__, "--start", *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def starts(use: str, folder: Path, changed: Path, repeats: int) -> Iterator[tuple[str, dict]]:
    """(what, figures) of each kind of start."""
    path = str(folder if use == "folder" else folder / "*.jsonl")
    yield "first start, 1 process", run(use, path, "full", 1)
    shutil.rmtree(folder / ".blt-index", ignore_errors=True)  # little text has none
    yield "first start, a process a CPU", run(use, path, "stat", 0)
    for _ in range(repeats):
        yield "second start", run(use, path, "stat", 0)
    text = changed.read_text()
    changed.write_text(text.replace("document", "Document").replace("return x", "return y"))
    time.sleep(SETTLED)
    yield "one file has changed", run(use, path, "stat", 0)


def whole_runs(folder: Path, repeats: int) -> Iterator[tuple[str, dict]]:
    """(what, figures) of ``blt train`` over a folder of lines, and over a few of them."""
    few = folder / "few"
    few.mkdir()
    with (folder / "0.jsonl").open() as lines:
        (few / "0.jsonl").write_text("".join(islice(lines, FEW_LINES)))
    for what, path, percent, count in (
        ("a run over all lines", folder, 0.1, repeats),
        (f"a run over {FEW_LINES} lines", few, 10, 1),
    ):
        config, out = few / "run.toml", few / "out"
        config.write_text(CONFIG.format(path=path / "*.jsonl", valid_percent=percent))
        code = "from blt_core.cli import main; main()"
        command = [sys.executable, "-c", code, "train", str(config), "--out", str(out)]
        for _ in range(count):
            began, spent = time.perf_counter(), children_seconds()
            subprocess.run(command, check=True, capture_output=True)
            yield what, {"seconds": time.perf_counter() - began, "cpu": children_seconds() - spent}
            shutil.rmtree(out)


def cpu() -> str:
    """The name of the processor, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def children_seconds() -> float:
    """CPU seconds of processes that have ended."""
    found = os.times()
    return found.children_user + found.children_system


def show(use: str, what: str, figures: dict[str, float | str]) -> None:
    """Print a row of the table."""
    print(
        f"{use:7} {what:30} {figures['seconds']:7.1f} s  {figures['cpu']:7.1f} s of CPU"
        f"  {str(figures.get('digest', ''))[:8]}".rstrip(),
        flush=True,
    )


def main() -> None:
    """Write both corpora, time their starts, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000, help="lines (0: none)")
    parser.add_argument("--document-bytes", type=int, default=500)
    parser.add_argument("--files", type=int, default=1_000_000, help="files (0: none)")
    parser.add_argument("--repeats", type=int, default=3, help="second starts")
    parser.add_argument("--start", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        use, path, check, workers = options.start
        start(use, path, check, int(workers))
        return
    print(f"{cpu()}, {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory() as name:
        for use, count in (("jsonl", options.documents), ("folder", options.files)):
            if not count:
                continue
            folder = Path(name) / use
            folder.mkdir()
            if use == "jsonl":
                write_lines(folder, count, options.document_bytes)
                changed = folder / "0.jsonl"
            else:
                write_files(folder, count)
                changed = folder / "d0000" / "file0000000.py"
            time.sleep(SETTLED)
            print(f"{use}: {count:,} documents")
            for what, figures in starts(use, folder, changed, options.repeats):
                show(use, what, figures)
            if use == "jsonl":
                for what, figures in whole_runs(folder, options.repeats):
                    show(use, what, figures)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
