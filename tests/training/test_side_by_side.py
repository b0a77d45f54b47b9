"""Passes in threads: the gradients of passes one after another, to the last bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blt_plugins.training.backends.side_by_side import SideBySide
from blt_plugins.training.backends.torch import TorchBackend
from blt_plugins.training.run.job import Job
from blt_plugins.training.run.trainer import Trainer
from tests.nightly import nightly_or


class Two(nn.Module):
    """Parameters whose gradients are one and the same tensor, and one without any."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(3))
        self.b = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(2))

    def loss(self, factor: float) -> Tensor:
        return ((self.a + self.b) * factor).sum()


@pytest.fixture
def pairs() -> Iterator[SideBySide]:
    made = SideBySide(2)
    yield made
    made.close()


def test_gradients_of_all_passes_are_added_each_in_memory_of_its_own(pairs):
    module = Two()
    parameters = list(module.parameters())
    pairs.add([partial(module.loss, each) for each in (1.0, 2.0, 5.0)], parameters, accumulate=4)
    assert torch.equal(module.a.grad, torch.full((3,), 2.0))
    assert module.unused.grad is None
    module.a.grad.zero_()
    assert torch.equal(module.b.grad, torch.full((3,), 2.0))


def test_two_passes_run_at_once_and_no_more_are_begun(pairs):
    module, meeting = Two(), threading.Barrier(2)
    read, inside, most, done = 0, 0, 0, 0
    lock = threading.Lock()

    def loss() -> Tensor:
        nonlocal inside, most, done
        with lock:
            inside += 1
            most = max(most, inside)
        meeting.wait(timeout=120)  # fails unless another pass arrives
        with lock:
            inside, done = inside - 1, done + 1
        return module.a.sum()

    def losses() -> Iterator[Callable[[], Tensor]]:
        nonlocal read
        for _ in range(4):
            read += 1
            assert read <= done + 3, "two passes run, and one waits"
            yield loss

    pairs.add(losses(), list(module.parameters()), accumulate=1)
    assert most == 2
    assert torch.equal(module.a.grad, torch.full((3,), 4.0))


def test_a_pass_that_fails_ends_the_step(pairs):
    def fails() -> Tensor:
        raise ValueError("no text")

    module = Two()
    with pytest.raises(ValueError, match="no text"):
        pairs.add([partial(module.loss, 1.0), fails], list(module.parameters()), accumulate=2)


def trained(job: Job, report: Any) -> tuple[dict[tuple[str, int], float], dict[str, Tensor]]:
    """The losses of a run, and the weights it ends with."""
    Trainer(job, report).run()
    return report.losses, {k: t.clone() for k, t in job.model.module_dict().state_dict().items()}


@pytest.mark.parametrize(
    "changed",
    [{}, {"gradient_checkpointing": True}, {"precision": "bfloat16"}],
    ids=["plain", "checkpointing", "bfloat16"],
)
def test_a_run_is_that_of_passes_one_after_another_bit_for_bit(new_job, tables, silent, changed):
    keys = {"accumulate": 4, "batch_bytes": 1024, "steps": nightly_or(4, 12), **changed}
    keys |= {"valid_drafts": 1, "scorer": {"steps": nightly_or(2, 8)}}
    tables["objective"] = {"use": "block-diffusion", "block_bytes": 4, "stale_share": 0.5}
    tables["decoder"]["denoises"] = True
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        losses, weights = trained(new_job("alone", **keys), silent())
        torch.set_num_threads(3)  # one for each pass, and no more passes than three
        tables["training_backend"] = {"use": "torch", "parallel_passes": 8}
        job = new_job("beside", **keys)
        others, same = trained(job, silent())
    finally:
        torch.set_num_threads(before)
    assert losses == others
    assert all(torch.equal(weights[name], same[name]) for name in weights)


@pytest.mark.parametrize(
    ("processes", "threads", "passes", "expected"),
    [(1, 4, 4, 3), (1, 2, 4, 2), (1, 4, 2, 2), (1, 1, 4, 1), (2, 4, 4, 1)],
)
def test_no_more_passes_run_at_once_than_torch_has_threads(
    monkeypatch, new_job, tables, processes, threads, passes, expected
):
    tables["training_backend"] = {"use": "torch", "parallel_passes": 3}
    job = new_job()
    assert isinstance(job.backend, TorchBackend)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    memory = job.backend.memory(nn.Linear(2, 2), processes=processes, accumulate=passes)
    assert memory.passes_at_once == expected
