"""Tests and intervals by hand, from tables, and by how often they cover the truth."""

import math

import numpy as np
import pytest

from amltrain.evaluation.statistics import (
    detectable,
    holm,
    image_draws,
    least_p,
    paired_t,
    sign_flip,
    two_sided,
    two_way,
)


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


def test_signs_are_flipped_in_every_way() -> None:
    """All five differences point one way: only that assignment and its mirror are as extreme."""
    assert sign_flip([0.0] * 5, [1.0, 2.0, 0.5, 3.0, 1.5]) == least_p(5) == 2 / 32
    assert sign_flip([0.0] * 3, [1.0, 1.0, 1.0]) == least_p(3) == 0.25
    assert sign_flip([0.0, 0.0], [1.0, -1.0]) == 1.0
    assert sign_flip([0.0] * 4, [0.0] * 4) == 1.0
    assert sign_flip([1.0], [2.0]) is None and sign_flip([1.0, 2.0], [3.0]) is None
    many = np.random.default_rng(0).normal(0.8, 1, 30)
    assert 0 < sign_flip([0.0] * 30, many.tolist()) < 0.01


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.04, 0.20 times 4, 3, 2, 1, never falling."""
    assert holm([0.04, 0.01, 0.20, 0.02]) == pytest.approx([0.08, 0.04, 0.20, 0.06])
    corrected = holm([0.9, math.nan, 0.6])
    assert corrected[::2] == [1.0, 1.0] and math.isnan(corrected[1])
    assert holm([]) == []


def test_what_so_many_pairs_can_find() -> None:
    """A difference of the stated size is found in four of five tries."""
    rng, spread = np.random.default_rng(0), []
    for _ in range(300):
        spread.append(detectable(rng.normal(0, 1, 6).tolist()))
    size = detectable((np.array([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0]) * math.sqrt(5 / 6)).tolist())
    assert size == pytest.approx(1.44, abs=0.01)  # 6 pairs, deviation 1: 80 % power needs 1.44 (tables of Cohen's d)
    found = [paired_t([0.0] * 6, rng.normal(size, 1, 6).tolist()).p < 0.05 for _ in range(400)]
    assert 0.74 < np.mean(found) < 0.86
    assert np.mean(spread) == pytest.approx(size * 0.95, rel=0.05)  # the deviation of few is a little too small
    assert math.isnan(detectable([1.0]))
    assert detectable([1.0, 2.0]) > detectable([1.0, 2.0, 1.5]) > 0
    assert detectable([1.0, 1.0, 1.0]) == 0


def test_draws_have_a_p() -> None:
    assert two_sided(np.zeros(99)) == 1.0
    assert two_sided(np.ones(99)) == pytest.approx(0.02)
    assert two_sided(np.concatenate([np.ones(90), -np.ones(9)])) == pytest.approx(0.2)
    assert math.isnan(two_sided(np.full(3, math.nan)))


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_over_images_and_seeds_cover_the_truth(seeds: int) -> None:
    """A true difference of 1, images that differ by 2 and seeds that differ by 0.5: about 95 % of intervals have it.

    Intervals over images alone, as most papers print, have it far less often.
    """
    rng, images, tries = np.random.default_rng(seeds), 60, 200
    both = alone = 0
    for number in range(tries):
        of_image = rng.normal(0, 2, images)
        values = 1 + of_image + rng.normal(0, 0.5, (seeds, 1)) + rng.normal(0, 1, (seeds, images))
        weights = image_draws(np.arange(images), 400, number)
        drawn = values @ weights.T / images
        low, high = np.percentile(two_way(drawn, number), [2.5, 97.5])
        both += low <= 1 <= high
        low, high = np.percentile(drawn.mean(0), [2.5, 97.5])
        alone += low <= 1 <= high
    assert 0.91 <= both / tries <= 0.995
    assert alone < both
