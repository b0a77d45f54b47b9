"""Reading all documents of a corpus to index them, in several processes where there is much.

The processes are plain programs that talk over pipes in JSON lines and raw numbers: no module of
the caller is imported again in them, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from blt_core.errors import BltError, DataError, RunError
from blt_core.log import logger
from blt_plugins.training.corpora.index import Found, Part, Reader, find
from blt_plugins.training.corpora.sources import Files, LocalFiles, RemoteFiles, file_system
from blt_plugins.training.corpora.unwanted import check_wanted
from blt_plugins.training.corpora.urls import shown

#: Bytes and files that a process reads before it answers.
TASK_BYTES, TASK_FILES = 1 << 24, 2000
#: Less than so many tasks are not worth the half second in which a process starts.
FEW_TASKS = 4
#: Processes, unless a number is asked for: each holds a piece of a table in memory, and disks and
#: networks serve no more of them faster.
MOST_WORKERS = 8
#: Seconds after which it is looked whether the answers are still wanted.
_GLANCE = 0.2

_START = (
    "import sys; sys.path[:] = sys.argv[1].split(sys.argv[2]); "
    "from blt_plugins.training.corpora.indexing import serve; serve()"
)
_ARRAYS = (np.int64, np.int64, np.uint64, np.int64)


def find_all(
    reader: Reader, files: Sequence[int], sizes: Sequence[int], workers: int | None
) -> Found:
    """The documents of some files, whose sizes in bytes are known; a part is a file.

    The same whatever the number of workers. Raises the DataError of the first file that is at
    fault, RunError if a process ends before it has answered.
    """
    tasks = list(_tasks(reader, files, sizes))
    count = min(workers or min(_cpus(), MOST_WORKERS), len(tasks)) if reader.files.shared else 1
    if workers is None and len(tasks) < FEW_TASKS:
        count = 1
    if count > 1:
        with contextlib.closing(_in_processes(reader, tasks, count)) as answers:
            found = Found.joined(answers)
    else:
        found = Found.joined(_in_this_process(reader, tasks))
    numbers = {file: number for number, file in enumerate(files)}
    counts = np.zeros(len(files), dtype=np.int64)
    owners = [numbers[part.file] for task in tasks for part in task]
    np.add.at(counts, np.array(owners, dtype=np.int64), found.counts)
    return Found(counts, found.sizes, found.keys, found.places)


def _tasks(reader: Reader, files: Sequence[int], sizes: Sequence[int]) -> Iterator[list[Part]]:
    """Parts of all files, in order, in groups that are worth an answer."""
    task: list[Part] = []
    held = 0
    for file, size in zip(files, sizes, strict=True):
        parts: Sequence[Part] = [Part(file)]
        if size > TASK_BYTES:
            with contextlib.suppress(DataError):  # which is raised in its turn, where it is read
                parts = reader.parts(file, size, TASK_BYTES)
        for part in parts:
            task.append(part)
            held += size // len(parts)
            if held >= TASK_BYTES or len(task) >= TASK_FILES:
                yield task
                task, held = [], 0
    if task:
        yield task


def _cpus() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# -- the side that asks --------------------------------------------------------------------------


def _in_this_process(reader: Reader, tasks: Sequence[Sequence[Part]]) -> Iterator[Found]:
    for task in tasks:
        check_wanted()
        yield find(reader, task)


def _in_processes(
    reader: Reader, tasks: Sequence[Sequence[Part]], count: int
) -> Generator[Found, None, None]:
    """The answer to each task, in order, by threads that have processes read for them."""
    workers = list[_Worker]()
    try:
        _start_workers(reader, count, workers)
        if not workers:
            yield from _in_this_process(reader, tasks)
            return
        yield from _answers(workers, tasks)
    finally:
        for worker in workers:
            worker.kill()


def _start_workers(reader: Reader, count: int, workers: list[_Worker]) -> None:
    """Append them to ``workers``, as many as the system lets start, at most ``count``."""
    try:
        workers.extend(_Worker(reader) for _ in range(count))
    except OSError as error:
        reason = error.strerror or str(error)
        logger().warning("fewer processes index the corpus", count=len(workers), reason=reason)


def _answers(workers: Sequence[_Worker], tasks: Sequence[Sequence[Part]]) -> Iterator[Found]:
    idle = SimpleQueue[_Worker]()
    for worker in workers:
        idle.put(worker)

    def ask(task: Sequence[Part]) -> Found:
        worker = idle.get()
        try:
            return worker.find(task)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(len(workers))
    try:
        for answer in [threads.submit(ask, task) for task in tasks]:
            while not wait([answer], timeout=_GLANCE).done:
                check_wanted()
            check_wanted()
            yield answer.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.end()
        threads.shutdown()


class _Worker:
    """A process that reads. It ends when its input does, so also when this process is killed."""

    def __init__(self, reader: Reader) -> None:
        self._names = reader.files.names
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # noqa: PTH109
        self._process = subprocess.Popen(  # noqa: S603 -- Python itself
            [sys.executable, "-c", _START, path, os.pathsep],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        kind, files = type(reader), reader.files
        self._setup: dict[str, Any] | None = {
            "module": kind.__module__,
            "reader": kind.__qualname__,
            "settings": dict(reader.settings),
            "root": files.root,
            "url": files.url,
            "options": dict(files.options),
        }

    def find(self, task: Sequence[Part]) -> Found:
        """What the process finds; raises DataError for what it cannot read."""
        numbers = {part.file: i for i, part in enumerate({p.file: p for p in task}.values())}
        order = {
            "setup": self._setup,
            "names": [self._names[file] for file in numbers],
            "parts": [[numbers[part.file], part.begin, part.end] for part in task],
        }
        self._setup = None
        try:
            return self._ask(order)
        except (BrokenPipeError, EOFError) as error:
            code = self._process.wait()
            raise RunError(
                f"a process that indexes the corpus has ended with {code}\n"
                "  fix: see its messages; if the system ended it for want of memory, free some"
            ) from error

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()

    def kill(self) -> None:
        """End it, and close its pipes, which no thread uses any more."""
        self.end()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # of what was not sent yet
                    pipe.close()

    def _ask(self, order: Mapping[str, Any]) -> Found:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise EOFError
        stdin.write(json.dumps(order).encode() + b"\n")
        stdin.flush()
        answer = json.loads(_exactly(stdout, int(_exactly(stdout, 8))))
        if "wrong" in answer:
            raise DataError(answer["wrong"])
        if "failed" in answer:
            raise RunError(f"a process that indexes the corpus failed:\n{answer['failed']}")
        return Found(
            *(
                np.frombuffer(_exactly(stdout, 8 * length), kind).copy()
                for kind, length in zip(_ARRAYS, answer["lengths"], strict=True)
            )
        )


def _exactly(stream: Any, size: int) -> bytes:
    data: bytes = stream.read(size)
    if len(data) != size:
        raise EOFError
    return data


# -- the side that reads -------------------------------------------------------------------------


def serve() -> None:
    """Answer orders on stdin until it ends, on what was stdout; prints go to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the caller's, who ends this process
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        make: Callable[[Sequence[str]], Reader]  # the first order has a setup
        for line in iter(_lines_of_stdin().get, b""):
            order = json.loads(line)
            if order["setup"] is not None:
                make = _maker(order["setup"])
            try:
                found = find(make(order["names"]), [Part(*part) for part in order["parts"]])
            except BltError as error:
                _answer(answers, {"wrong": str(error)})
            except Exception:  # noqa: BLE001 -- the caller raises it
                _answer(answers, {"failed": shown(traceback.format_exc())})
            else:
                columns = (found.counts, found.sizes, found.keys, found.places)
                _answer(answers, {"lengths": [len(each) for each in columns]}, columns)


def _lines_of_stdin() -> SimpleQueue[bytes]:
    """Its lines, as they come. At its end this process ends, whatever it does: its caller has."""
    lines = SimpleQueue[bytes]()

    def read() -> None:
        for line in sys.stdin.buffer:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _maker(setup: Mapping[str, Any]) -> Callable[[Sequence[str]], Reader]:
    """What makes a reader of some names, as the caller's."""
    kind = getattr(importlib.import_module(setup["module"]), setup["reader"])
    root, url, options = setup["root"], setup["url"], setup["options"]
    system = None if url is None else file_system(url, options)[0]

    def make(names: Sequence[str]) -> Reader:
        files: Files = (
            LocalFiles(names, root)
            if url is None
            else RemoteFiles(names, root, "", url, options, system)
        )
        reader: Reader = kind(files, **setup["settings"])
        return reader

    return make


def _answer(
    stream: BinaryIO, header: Mapping[str, Any], columns: Sequence[npt.NDArray[Any]] = ()
) -> None:
    text = json.dumps(header).encode()
    stream.write(f"{len(text):8}".encode() + text)
    stream.writelines(column.tobytes() for column in columns)
    stream.flush()
