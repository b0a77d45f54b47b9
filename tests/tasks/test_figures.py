"""Scores of items, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt_core.evaluation.figures import DRAWS, Given, Resampled, interval, mean, ratio, relative
from blt_plugins.tasks.translation import corpus_figure, metrics

WORDS = st.lists(
    st.sampled_from(["the", "a", "cell", "row", "Click.", "press", ")", "é"]), max_size=8
)
SENTENCES = WORDS.map(" ".join)


@given(st.lists(st.tuples(SENTENCES, SENTENCES), min_size=1, max_size=8))
def test_scores_of_translations_are_sacrebleu_s(pairs):
    outputs, targets = map(list, zip(*pairs, strict=True))
    for metric in metrics().values():
        expected = metric.corpus_score(outputs, [targets]).score
        assert corpus_figure(metric, outputs, targets).value == pytest.approx(expected, abs=1e-9)


def test_an_interval_is_that_of_resampled_items():
    values = [float(n % 3) for n in range(40)]
    found = interval(mean(values), 7)
    assert found.value == pytest.approx(np.mean(values))
    # By hand: whole resamples, scored one by one.
    rng = np.random.default_rng(1)
    drawn = [np.mean(rng.choice(values, 40)) for _ in range(4000)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=0.05)
    assert found.high == pytest.approx(high, abs=0.05)
    assert found == interval(mean(values), 7), "the same seed gives the same numbers"
    assert found != interval(mean(values), 8)
    again = interval(Resampled(values, np.mean), 7)
    assert again.value == pytest.approx(found.value)
    assert again.low == pytest.approx(found.low, abs=0.12)


def test_a_ratio_is_of_the_same_resamples():
    values = [1.0, 5.0, 2.0, 8.0, 3.0]
    same = relative(mean(values), mean(values), 0)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    half = relative(mean([v / 2 for v in values]), mean(values), 0)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    assert relative(mean(values), mean([0.0] * 5), 0) is None


def test_a_given_score_has_an_interval_where_its_error_is_known():
    assert interval(Given(0.5), 0).low is None
    found = interval(Given(0.5, 0.1), 0)
    assert found.low == pytest.approx(0.5 - 1.96 * 0.1, abs=0.03)
    assert len(Given(0.5, 0.1).draws(0)) == DRAWS


def test_a_ratio_of_sums_is_no_mean_of_ratios():
    assert ratio([1, 3], [1, 1], -2.0).value == -4.0
    assert ratio([1, 3], [10, 30]).value == pytest.approx(0.1)
    nothing = interval(ratio([1], [0]), 0)
    assert np.isnan(nothing.value)
    assert nothing.low is None
