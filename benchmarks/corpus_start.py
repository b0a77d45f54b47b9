"""How long training waits for its corpus: when it is read for the first time, and with its index.

Each start is a process of its own, timed within it from the search for files to the digest; CPU
seconds are of that process alone. Texts are written in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

#: Seconds after which files count as unchanged by their times.
SETTLED = 2.5
FILES_A_FOLDER = 1000


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
    shutil.rmtree(folder / ".blt-index")
    yield "first start, a process a CPU", run(use, path, "stat", 0)
    for _ in range(repeats):
        yield "second start", run(use, path, "stat", 0)
    text = changed.read_text()
    changed.write_text(text.replace("document", "Document").replace("return x", "return y"))
    time.sleep(SETTLED)
    yield "one file has changed", run(use, path, "stat", 0)


def main() -> None:
    """Write both corpora, time their starts, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000, help="lines of JSON Lines")
    parser.add_argument("--document-bytes", type=int, default=500)
    parser.add_argument("--files", type=int, default=1_000_000, help="files of a folder")
    parser.add_argument("--repeats", type=int, default=3, help="second starts")
    parser.add_argument("--start", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        use, path, check, workers = options.start
        start(use, path, check, int(workers))
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs")
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
            for what, figures in starts(use, folder, changed, options.repeats):
                print(
                    f"{use:7} {figures['documents']:9,} documents  {what:30}"
                    f" {figures['seconds']:7.1f} s  {figures['cpu']:7.1f} s of CPU"
                    f"  {figures['digest'][:8]}",
                    flush=True,
                )
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
