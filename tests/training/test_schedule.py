"""Learning rates, parameter groups."""

from __future__ import annotations

import pytest
from torch import nn

from blt_plugins.training.backends.parameters import parameter_groups
from blt_plugins.training.setup.schedule import Schedule


def rates(steps: int = 100, **options) -> list[float]:
    schedule = Schedule(steps=steps, **{"peak": 2.0, "warmup_steps": 10, **options})
    return [schedule.rate(step) for step in range(steps)]


def test_a_cosine_ends_at_the_final_share():
    found = rates()
    assert found[0] == pytest.approx(0.2)
    assert found[4] == pytest.approx(1.0)
    assert found[10] == pytest.approx(2.0)
    assert found[55] == pytest.approx(1.1)  # half way: the mean of peak and end
    assert found[99] == pytest.approx(0.2, rel=0.01)
    assert found[10:] == sorted(found[10:], reverse=True)


def test_a_constant_rate_stays_at_the_peak():
    assert rates(shape="constant")[:11] == rates()[:11]
    assert set(rates(shape="constant")[10:]) == {2.0}


def test_a_stable_rate_decays_at_the_end_alone():
    found = rates(shape="wsd", decay_share=0.3)
    assert found[:11] == rates()[:11]
    assert set(found[10:71]) == {2.0}
    assert found[85] == pytest.approx(1.1)
    assert found[99] == pytest.approx(0.2 + 1.8 / 30)


@pytest.mark.parametrize("shape", ["cosine", "constant", "wsd"])
def test_a_run_shorter_than_its_warm_up_has_rates_too(shape):
    assert rates(3, peak=1.0, final_rate=0, shape=shape)[2] == pytest.approx(0.3)
    assert rates(1, peak=1.0, warmup_steps=0, final_rate=0.5, shape=shape) == [1.0]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_decay_and_nothing_else_are_schedules_too(share):
    found = rates(shape="wsd", decay_share=share)
    assert found[:11] == rates()[:11]
    assert found == sorted(found[:10]) + sorted(found[10:], reverse=True)


def test_matrices_decay_and_norms_and_tables_do_not():
    module = nn.ModuleDict(
        {"table": nn.Embedding(4, 3), "matrix": nn.Linear(3, 2), "norm": nn.RMSNorm(2)}
    )
    decaying, rest = parameter_groups(module, 0.1)
    assert [p.shape for p in decaying["params"]] == [(2, 3)]
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert len(rest["params"]) == 3
