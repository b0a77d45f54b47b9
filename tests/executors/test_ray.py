"""A Ray cluster of several nodes, on this machine: workers are killed and a node removed."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from blt_core.cli.app import run as blt
from blt_core.component import BuildContext
from blt_core.errors import RunError
from blt_core.testing import check_component
from blt_plugins.executors.ray import RayExecutor, RayParams, _connect, _RayWorkers
from tests.conformance.test_first_party import PLUGINS
from tests.executors.works import WORKS, interrupted
from tests.nightly import nightly_or

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of Ray
    pytest.mark.usefixtures("_token"),
]

#: How far the workers of a cluster stand back for other processes.
NICENESS = "RAY_worker_niceness"


@pytest.fixture(scope="module")
def _token():
    """A home with a token of Ray, as a cluster that ``--executor ray`` has started leaves one."""
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        (Path(home) / ".ray").mkdir()
        (Path(home) / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
        patch.setenv("HOME", home)
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
            patch.setenv(name, "")  # to be as before after this
            patch.delenv(name)
        yield


def test_an_address_where_nobody_answers_is_named():
    executor = RayExecutor(RayParams(address="127.0.0.1:1"), BuildContext())
    with pytest.raises(RunError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        executor.start(None).__enter__()


def test_what_a_cluster_wants_that_does_not_let_us_in_is_said(monkeypatch):
    import ray

    def refusing(error):
        def init(**_):
            raise error

        return SimpleNamespace(init=init, exceptions=ray.exceptions)

    monkeypatch.setattr("blt_plugins.executors.ray._reach", lambda _: True)
    there = RayParams(address="head:6379")
    for error in (ConnectionError("Failed to connect"), ray.exceptions.AuthenticationError("no")):
        with pytest.raises(RunError, match=r"(?s)head:6379.*fix: .*auth_token.*RAY_AUTH_MODE"):
            _connect(refusing(error), there)


def test_workers_of_a_cluster_that_is_started_here_get_their_part_of_a_busy_cpu(monkeypatch):
    import ray

    def init(**_):
        seen.append(os.environ[NICENESS])

    here = SimpleNamespace(init=init, exceptions=ray.exceptions)
    seen = []
    for own in (None, "7"):
        with monkeypatch.context() as patch:
            patch.setenv(NICENESS, own or "")  # to be as before after this
            if own is None:
                patch.delenv(NICENESS)
            _connect(here, RayParams())
    assert seen == ["0", "7"]


@pytest.fixture(scope="module")
def cluster(_token):
    """Two nodes of one CPU, which want a token; this process belongs to the first."""
    # Where Ray is imported before there is a token it is not shown to the cluster, which refuses.
    RayExecutor(RayParams(), BuildContext())
    import ray
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_log_monitor": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")  # for nodes: this process has what it was given
        patch.setenv(NICENESS, "0")  # see `_connect`
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_prestart_worker_first_driver", "0")
        patch.setenv("RAY_enable_worker_prestart", "0")
        head = {**options, "include_dashboard": False, "no_monitor": True}
        made = Cluster(initialize_head=True, head_node_args=head)
        # Connected before there is another node on this machine, which it might be given to.
        _connect(ray, RayParams(address=made.address))
        made.other = made.add_node(**options)
    yield made
    ray.shutdown()
    made.shutdown()


def workers_of(node):
    """Processes of this node that do tasks."""
    import psutil

    [raylet] = node.all_processes["raylet"]
    children = psutil.Process(raylet.process.pid).children()
    return [each for each in children if "_do" in " ".join(each.cmdline())]


#: Work that is given to the cluster, and whose workers are killed; see test_local.py for the rest.
WORK = {name: WORKS[name] for name in nightly_or(("evaluate", "generate"), tuple(WORKS))}


def test_work_is_done_as_here_while_workers_are_killed_and_a_node_is_removed(
    cluster, checkpoint, tmp_path, monkeypatch
):
    here, there = {}, {}
    for name, work in WORK.items():
        (tmp_path / name).mkdir()
        here[name] = work(checkpoint, tmp_path / name)

    def lose(_workers, count):
        if not lost and (busy := [*workers_of(cluster.other), *workers_of(cluster.head_node)]):
            busy[0].kill()
            return True
        if name == "generate" and len(lost) == 1 and count >= 3:
            cluster.remove_node(cluster.other, allow_graceful=False)
            return True
        return False

    for name, work in WORK.items():
        (tmp_path / f"{name}-there").mkdir()
        with monkeypatch.context() as patch:
            lost = interrupted(patch, _RayWorkers, lose)
            there[name] = work(checkpoint, tmp_path / f"{name}-there", "--executor", "ray")
        assert there[name] == here[name], name
        assert len(lost) == (2 if name == "generate" else 1), "lost while there was work"


@pytest.mark.nightly(reason="records of a cluster, and contracts of local, are in the plain run")
def test_ray_keeps_the_contracts(cluster):
    check_component("executor", "ray", {}, plugins=PLUGINS)
    assert blt(["plugins", "test", "executor", "ray"]) == 0
