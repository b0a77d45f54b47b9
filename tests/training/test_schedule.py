"""Learning rates, parameter groups."""

from __future__ import annotations

import pytest
from torch import nn

from blt_plugins.training.schedule import learning_rate, parameter_groups


def rate(step: int) -> float:
    return learning_rate(step, steps=100, peak=2.0, warmup_steps=10, final_rate=0.1)


def test_it_warms_up_linearly_and_ends_at_the_final_share():
    assert rate(0) == pytest.approx(0.2)
    assert rate(4) == pytest.approx(1.0)
    assert rate(10) == pytest.approx(2.0)
    assert rate(55) == pytest.approx(1.1)  # half way: the mean of peak and end
    assert rate(99) == pytest.approx(0.2, rel=0.01)
    assert all(rate(step) >= rate(step + 1) for step in range(10, 99))


def test_a_run_shorter_than_its_warm_up_has_rates_too():
    assert learning_rate(2, steps=3, peak=1.0, warmup_steps=10, final_rate=0) == pytest.approx(0.3)
    assert learning_rate(0, steps=1, peak=1.0, warmup_steps=0, final_rate=0.5) == 1.0


def test_matrices_decay_and_norms_and_tables_do_not():
    module = nn.ModuleDict(
        {"table": nn.Embedding(4, 3), "matrix": nn.Linear(3, 2), "norm": nn.RMSNorm(2)}
    )
    decaying, rest = parameter_groups(module, 0.1)
    assert [p.shape for p in decaying["params"]] == [(2, 3)]
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert len(rest["params"]) == 3
