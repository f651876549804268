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
    differences = [b - a for a, b in zip(one, two, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    variance = sum((d - mean) ** 2 for d in differences) / (count - 1)
    if variance == 0:
        return PairedTest(math.nan, math.nan, count)
    t = mean / math.sqrt(variance / count)
    return PairedTest(t, two_sided_p(t, count - 1), count)


def two_sided_p(t: float, freedom: int) -> float:
    """P(|T| > |t|) of Student's t with `freedom` degrees (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(2 + odd, freedom + 1, 2):  # the series has a term for every second degree
        total += term
        term *= cosine**2 * (k - 1) / k
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1 - inside)
