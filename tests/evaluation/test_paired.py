"""The paired t-test by hand and from a table, and what cannot be tested."""

import math

import numpy as np
import pytest

from amltrain.evaluation.compare import paired_t


def test_the_statistic_by_hand() -> None:
    one, two = np.random.default_rng(0).normal(50, 3, (2, 5))
    found, differences = paired_t(one.tolist(), two.tolist()), two - one
    assert found is not None and found.pairs == 5
    assert found.t == pytest.approx(differences.mean() / (differences.std(ddof=1) / math.sqrt(5)))


def test_p_is_the_tables() -> None:
    """|t| of 2.776 with 4 degrees of freedom has a two-sided p of 0.05."""
    differences = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    shift = 2.776 * differences.std(ddof=1) / math.sqrt(5) - differences.mean()
    found = paired_t([0.0] * 5, (differences + shift).tolist())
    assert found is not None and found.p == pytest.approx(0.05, abs=1e-4)


def test_what_cannot_be_tested() -> None:
    assert paired_t([1.0], [2.0]) is None
    assert paired_t([1.0, 2.0], [2.0]) is None
    equal = paired_t([1.0, 2.0], [2.0, 3.0])
    assert equal is not None and math.isnan(equal.p)
