"""Held-out text that is dealt out: shares, and what several processes find together.

Processes are threads here, each with a model of its own; test_processes.py has real ones.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_core.errors import DataError, RunError
from blt_plugins.training.data.load import load_data
from blt_plugins.training.data.shares import Share, deal
from blt_plugins.training.data.windows import Texts, cut_windows, make_batch
from blt_plugins.training.run.interrupts import Stopped
from blt_plugins.training.run.together import OtherProcessError, Together
from blt_plugins.training.scores.accuracy import masked_accuracy
from blt_plugins.training.scores.held_out import evaluate_model
from blt_plugins.training.scores.validation import Scores, validate
from tests.engine.models import model as tiny_model
from tests.training.groups import SECONDS, Group, Member
from tests.training.runs import BLOCKS


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 9))
def test_each_item_is_in_one_share_and_shares_are_of_like_size(sizes, processes):
    items = list(range(len(sizes)))
    shares = deal(items, sizes, processes)
    assert len(shares) == processes
    assert sorted(item for share in shares for item in share) == items
    assert all(share == sorted(share) for share in shares)
    totals = [sum(sizes[item] for item in share) for share in shares]
    assert max(totals) - min(totals) <= max(sizes, default=0)


@pytest.fixture
def scored(tables, new_job):
    """Scores of the tiny model in float64, in some processes; keys go into [train]."""
    tables |= {"objective": BLOCKS, "decoder": {**tables["decoder"], "denoises": True}}
    tables["run"] = {"dtype": "float64"}

    def score(processes: int, **train: Any) -> list[Scores]:
        def one(backend: Member) -> Scores:
            torch.manual_seed(0)
            data = load_data(
                job.corpus, job.settings, job.model, rank=backend.rank, world_size=processes
            )
            sizes.append(sum(batch.scored for batch in data.valid))
            together = Together(backend, lambda: False, "score")
            with together.work():
                return validate(
                    job.model,
                    data.valid,
                    data.prefixes,
                    job.plugins,
                    block_bytes=4,
                    longest_prefix=data.longest_prefix,
                    processes=together,
                )

        torch.manual_seed(0)
        job, sizes = new_job(**train), []
        found = Group(processes).run(one)
        score.sizes = sizes
        return found

    return score


def assert_same(found: Scores, wanted: Scores) -> None:
    assert found.held_out.bytes == wanted.held_out.bytes
    for name, value in wanted.record().items():
        assert found.record()[name] == pytest.approx(value, rel=1e-9, abs=0), name


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_the_score_is_the_same_in_any_number_of_processes(scored, processes):
    keys = {"valid_bytes": 400, "valid_drafts": 9, "batch_bytes": 100}
    [alone] = scored(1, **keys)
    (whole,) = scored.sizes
    assert {"masked_accuracy/1.0", "accepted/blt-s draft_bytes=16"} <= alone.record().keys()
    for found in scored(processes, **keys):
        assert_same(found, alone)
    assert sum(scored.sizes) == whole
    assert max(scored.sizes) - min(scored.sizes) <= 64  # a window


def test_fewer_windows_than_processes_leave_some_with_none(scored):
    keys = {"valid_bytes": 1, "valid_drafts": 1}
    [alone] = scored(1, **keys)
    for found in scored(3, **keys):
        assert_same(found, alone)
    assert sorted(scored.sizes)[:2] == [0, 0]


def test_text_without_a_byte_is_refused_in_every_process():
    model = tiny_model(0)
    batch = make_batch(Texts([b""]), cut_windows(Texts([b""]), 8), model.scheme)

    def one(backend: Member) -> None:
        together = Together(backend, lambda: False, "score")
        with together.work():
            share = Share([batch] if backend.rank else [], 1)
            evaluate_model(model, together.each(share), together.total)

    assert [type(each) for each in Group(2).run(one)] == [DataError, DataError]


@pytest.mark.parametrize("where", ["batch", "start", "end"])
def test_a_failure_in_one_process_ends_the_work_of_all(where):
    def one(backend: Member) -> None:
        together = Together(backend, lambda: False, "score of step 3")
        with together.work():
            if backend.rank == 1 and where == "start":
                raise ValueError(where)
            for number in together.each(Share([1, 2, 3], 3)):
                if backend.rank == 1 and (where, number) == ("batch", 2):
                    raise ValueError(where)
            together.total([1.0])
            if backend.rank == 1 and where == "end":
                raise ValueError(where)

    first, failed, last = Group(3).run(one)
    assert isinstance(failed, ValueError)
    for each in (first, last):
        assert isinstance(each, OtherProcessError)
        assert str(each).startswith("score of step 3: failed in process 1 of 3")


def test_a_request_to_one_process_stops_all_before_the_same_round():
    seen: dict[int, list[int]] = {0: [], 1: []}

    def one(backend: Member) -> None:
        together = Together(backend, lambda: seen[0] == [1, 2], "score")
        with together.work():
            for number in together.each(Share([1, 2, 3] if backend.rank == 0 else [1], 3)):
                seen[backend.rank].append(number)

    assert [type(each) for each in Group(2).run(one)] == [Stopped, Stopped]
    assert seen == {0: [1, 2], 1: [1]}


def test_a_group_that_is_lost_is_an_error_and_is_asked_nothing_more():
    class Lost:
        rank, world_size, calls = 0, 2, 0

        def mean(self, values):
            self.calls += 1
            raise RuntimeError("Connection closed by peer")

    lost = Lost()
    together = Together(lost, lambda: False, "score")
    with (
        pytest.raises(RunError, match="another process has ended, or does not answer: Conn"),
        together.work(),
    ):
        list(together.each(Share([], 1)))
    assert lost.calls == 1


def test_blocks_of_a_window_do_not_depend_on_the_batch_that_it_is_in():
    texts = [b"def f(x):\n    return x + 1\n", b"import os", b"print(os.getcwd(), end='')\n" * 2]
    model = tiny_model(0)
    windows = cut_windows(Texts(texts), 100)

    def found(*groups: Sequence[int]) -> dict[str, float]:
        batches = [make_batch(Texts(texts), [windows[i] for i in g], model.scheme) for g in groups]
        return masked_accuracy(model, batches, 4, (0.5, 1.0))

    assert found((0, 1, 2)) == found((2, 0), (1,)) == found((1,), (2,), (0,))


# -- work that process 0 does first ---------------------------------------------------------------


@pytest.mark.parametrize("beats", [0, 3])
def test_process_0_does_its_work_before_the_others_begin_however_long_it_takes(monkeypatch, beats):
    monkeypatch.setattr("blt_plugins.training.run.together.BEAT", 0.01)
    order: list[int] = []

    def one(backend: Member) -> int:
        together, heard = Together(backend, lambda: False, "the corpus"), threading.Event()

        def do() -> int:
            if backend.rank == 0 and beats:
                assert heard.wait(SECONDS)
            order.append(backend.rank)
            return backend.rank

        total, rounds = together.total, iter(range(1, 10**6))

        def counted(values: Sequence[float]) -> list[float]:
            if next(rounds) == beats:
                heard.set()
            return total(values)

        together.total = counted
        with together.work():
            return together.first_alone(do)

    assert Group(3).run(one) == [0, 1, 2]
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


def test_the_others_may_take_as_long_where_they_share_no_disk(monkeypatch):
    monkeypatch.setattr("blt_plugins.training.run.together.BEAT", 0.01)
    beats, enough = [], threading.Event()

    def one(backend: Member) -> int:
        together = Together(backend, lambda: False, "the corpus")
        total = together.total

        def counted(values: Sequence[float]) -> list[float]:
            beats.append(backend.rank)
            if beats.count(0) >= 5:
                enough.set()
            return total(values)

        def do() -> int:
            if backend.rank == 1:
                assert enough.wait(SECONDS)
            return backend.rank

        together.total = counted
        with together.work():
            return together.first_alone(do)

    assert Group(3).run(one) == [0, 1, 2]
    assert beats.count(0) == beats.count(1) == beats.count(2) >= 5


def test_the_others_hear_that_process_0_has_failed_alone():
    def one(backend: Member) -> None:
        together = Together(backend, lambda: False, "the corpus")

        def do() -> None:
            assert backend.rank == 0, "the others have nothing to read"
            raise DataError("a.jsonl:3: not valid JSON")

        with together.work():
            together.first_alone(do)

    first, *others = Group(3).run(one)
    assert str(first) == "a.jsonl:3: not valid JSON"
    for other in others:
        assert isinstance(other, OtherProcessError)
        assert "the corpus: failed in process 0 of 3" in str(other)
