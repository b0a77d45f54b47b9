"""Processes of this machine: the same results as one, whatever happens to them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading

import pytest

from blt_core.component import BuildContext
from blt_core.errors import ConfigError, DataError, Problem, RequestError, RunError
from blt_core.execution import AtHand, Here, WorkError, torch_threads
from blt_core.kernels.candidates import ROW_CLASSES
from blt_core.kernels.choice import Choice, stored_at
from blt_core.kernels.using import weights_of
from blt_core.pipeline import Pipeline
from blt_core.testing import check_component
from blt_plugins.executors.local import LocalExecutor, LocalParams, _Processes
from tests.conformance.test_first_party import PLUGINS
from tests.executors.conftest import RUN
from tests.executors.works import WORKS, interrupted
from tests.nightly import NIGHTLY, nightly_or


def test_a_worker_is_killed_and_the_records_are_those_of_one_process(generated):
    killed = []

    def watch(done, total):
        if not killed and done > 2:
            [worker, *_] = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(worker.pid)

    here, there = generated({"use": "local", "workers": 2}, watch)
    assert here == there
    assert killed
    assert not multiprocessing.active_children()


def test_workers_have_the_kernels_of_the_process_that_they_work_for(
    checkpoint, generated, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = {"checkpoint": str(checkpoint), "dtype": "float32"}
    weights = weights_of(Pipeline.from_config({"schema": 1, "run": run}).model.module_dict())
    for threads, kernel in ((1, "linear"), (2, "columns")):  # as measured on this machine
        with torch_threads(threads):
            stored_at().parent.mkdir(parents=True, exist_ok=True)
            Choice(dict.fromkeys(weights, dict.fromkeys(ROW_CLASSES, kernel))).write(stored_at())
    with torch_threads(2):
        here, there = generated(
            {"use": "local", "workers": 2, "threads": 1}, dtype="float32", kernels="measured"
        )
    assert here == there
    told = {record["kernels"] for record in here if "error" not in record}
    columns = dict.fromkeys(weights, dict.fromkeys(ROW_CLASSES, "columns"))
    assert told == {Choice(columns).digest()}


@pytest.mark.parametrize("name", nightly_or(("score", "evaluate"), tuple(WORKS)))
def test_two_workers_do_what_one_process_does(checkpoint, tmp_path, monkeypatch, name):
    # Of generate see above, of prepare test_prepare.py; in a nightly run a worker is killed.
    def lose(workers, count):
        if lost or not NIGHTLY:
            return False
        next(each for each in workers._workers if each.task is not None)._process.kill()
        return True

    found = []
    for executor in ((), ("--executor", "local workers=2")):
        folder = tmp_path / f"{len(executor)}"
        folder.mkdir()
        with monkeypatch.context() as patch:
            lost = interrupted(patch, _Processes, lose)
            found.append(WORKS[name](checkpoint, folder, *executor))
    assert found[0] == found[1]
    assert len(lost) == NIGHTLY
    assert not multiprocessing.active_children()


def test_one_worker_is_this_process_and_loads_no_model_again(generated, monkeypatch):
    load, loaded = Pipeline.load.__func__, []

    def counted(cls, *args, **keys):
        loaded.append(args)
        return load(cls, *args, **keys)

    monkeypatch.setattr(Pipeline, "load", classmethod(counted))
    here, there = generated({"use": "local"})
    assert here == there
    assert len(loaded) == 2, "each of the two pipelines once"
    begin = pickle.loads(pickle.dumps(AtHand(here)))
    assert begin.value is None, "other processes load their own"


def test_what_is_at_hand_is_so_in_its_thread_alone():
    at_hand, elsewhere = AtHand("a source"), []
    thread = threading.Thread(target=lambda: elsewhere.append(at_hand.value))
    thread.start()
    thread.join()
    assert (at_hand.value, elsewhere) == ("a source", [None])


def _deadly(tell):
    def work(task):
        if task == 1:
            os._exit(1)
        return task

    return work


def test_a_task_that_kills_its_worker_each_time_ends_the_run():
    executor = LocalExecutor(LocalParams(workers=2, retries=0), BuildContext())
    with (
        pytest.raises(RunError, match=r"(?s)before its time, .* 1 × in all; .*fewer workers"),
        executor.start(_deadly) as workers,
    ):
        list(workers.run([1]))
    assert not multiprocessing.active_children()


WAITS = """
import sys, time
from blt_core.component import BuildContext
from blt_plugins.executors.local import LocalExecutor, LocalParams

def make(tell):
    return lambda task: print("works", flush=True) or time.sleep(600)

if __name__ == "__main__":
    with LocalExecutor(LocalParams(workers=2), BuildContext()).start(make) as workers:
        list(workers.run([1]))
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"works\n"
    process.kill()
    # The pipe is closed when the last process that holds it has ended.
    assert process.communicate(timeout=60)[0] == b""


@pytest.mark.nightly(reason="the same contracts hold for one worker in test_first_party.py")
def test_several_workers_keep_the_contracts():
    check_component("executor", "local", {"workers": 2}, plugins=PLUGINS)


class OddError(DataError):
    """One that cannot be unpickled, as a plugin's may be."""

    def __init__(self, place, text):
        super().__init__(f"{place}: {text}")


def _odd(tell):
    def work(task):
        if task == "ours":
            raise OddError("a.txt", "is odd")
        if task == "large":
            return bytes(1 << 20)
        if task == "unsendable":
            return lambda: None
        return 1 // task

    return work


def test_errors_results_and_what_cannot_be_sent():
    executor = LocalExecutor(LocalParams(workers=2), BuildContext())
    with executor.start(_odd) as workers:
        assert list(workers.run(["large"])) == [(0, bytes(1 << 20))]
        for task, kind, text in (
            ("ours", DataError, "^a.txt: is odd$"),
            (0, WorkError, "ZeroDivisionError"),
            ("unsendable", WorkError, "Can't pickle|Can't get local"),
        ):
            with pytest.raises(kind, match=text):
                list(workers.run([task, 1]))
        assert list(workers.run([1])) == [(0, 1)]
    assert not multiprocessing.active_children()


def test_this_process_takes_a_task_when_the_one_before_is_taken():
    taken = []
    here = Here(lambda tell: lambda task: tell(task) or -task)
    results = here.run((taken.append(n) or n for n in range(1, 9)), taken.append)
    assert next(results) == (0, -1)
    assert taken == [1, 1], "a task, and what it told"


def test_errors_travel_whole():
    error = ConfigError([Problem("a.toml: x", "is wrong", ("fix: y",)), Problem("b", "too")])
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.problems == error.problems


def test_a_pipeline_that_a_program_changed_is_refused(checkpoint, tmp_path):
    run = {**RUN, "checkpoint": str(checkpoint)}
    pipeline = Pipeline.from_config({"schema": 1, "run": run, "executor": {"use": "local"}})
    assert pipeline.with_sampler("blt-s").config_for_workers().tables["sampler"]["use"] == (
        "speculative"
    )
    pipeline.sampler = pipeline.with_sampler("blt-s").sampler
    with pytest.raises(RequestError, match="a program made its sampler"):
        pipeline.config_for_workers()
