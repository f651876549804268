"""Paired t-test over seeds: are two models different, if the same seeds are trained again and again?"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class PairedTest(NamedTuple):
    """t, and the two-sided p of no difference, for n pairs; p is NaN where all differences are equal."""

    t: float
    p: float
    pairs: int


def paired_t(one: Sequence[float], two: Sequence[float]) -> PairedTest | None:
    """Test `two - one`, values of the same seeds in the same order; None for fewer than two pairs, or no pairs."""
    if len(one) != len(two) or len(one) < 2:
        return None
    from scipy.stats import ttest_rel  # slow to import

    if len({b - a for a, b in zip(one, two, strict=True)}) == 1:
        return PairedTest(math.nan, math.nan, len(one))
    found = ttest_rel(two, one)
    return PairedTest(float(found.statistic), float(found.pvalue), len(one))
