"""A Ray cluster of several nodes, on this machine: a worker is killed and a node removed."""

from __future__ import annotations

import importlib.util
import signal

import pytest

from blt_core.cli.app import run as blt
from blt_core.errors import RunError
from blt_core.testing import check_component
from tests.conformance.test_first_party import PLUGINS

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of Ray
]


def test_an_address_where_nobody_answers_is_named():
    from blt_core.component import BuildContext
    from blt_plugins.executors.ray import RayExecutor, RayParams

    executor = RayExecutor(RayParams(address="127.0.0.1:1"), BuildContext())
    with pytest.raises(RunError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        executor.start(None).__enter__()


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU; this process belongs to the first."""
    import ray
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 80_000_000}
    made = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    # Connected before there is another node on this machine, which it might be given to.
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
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


def test_a_worker_is_killed_and_a_node_removed_and_the_records_are_the_same(cluster, generated):
    done_by_then = []

    def watch(done, total):
        if not done_by_then and (busy := workers_of(cluster.other)):
            busy[0].send_signal(signal.SIGKILL)
            done_by_then.append(done)
        elif len(done_by_then) == 1 and done >= done_by_then[0] + 4:
            cluster.remove_node(cluster.other, allow_graceful=False)
            done_by_then.append(done)

    here, there = generated({"use": "ray"}, watch)
    assert here == there
    assert len(done_by_then) == 2, "both were lost while there was work"
    assert done_by_then[-1] < 25


@pytest.mark.nightly(reason="records of a cluster, and contracts of local, are in the plain run")
def test_ray_keeps_the_contracts(cluster):
    check_component("executor", "ray", {}, plugins=PLUGINS)
    assert blt(["plugins", "test", "executor", "ray"]) == 0
