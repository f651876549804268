"""The paired t-test against scipy, and what cannot be tested."""

import math

import numpy as np
import pytest
from scipy import stats

from amltrain.evaluation.paired import paired_t, two_sided_p


@pytest.mark.parametrize("freedom", range(1, 12))
def test_probability_against_scipy(freedom: int) -> None:
    for t in (0.0, 0.3, -1.7, 4.0, 12.0):
        assert two_sided_p(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), abs=1e-9)


def test_pairs_against_scipy() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 8):
        one, two = rng.normal(50, 3, (2, count))
        found, expected = paired_t(one.tolist(), two.tolist()), stats.ttest_rel(two, one)
        assert found is not None and found.pairs == count
        assert (found.t, found.p) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))


def test_what_cannot_be_tested() -> None:
    assert paired_t([1.0], [2.0]) is None
    assert paired_t([1.0, 2.0], [2.0]) is None
    equal = paired_t([1.0, 2.0], [2.0, 3.0])
    assert equal is not None and math.isnan(equal.p)
