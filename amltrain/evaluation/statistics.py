"""Tests and intervals for differences between two models: over images, over seeds, and over both at once.

Two things vary between one measurement and the next: the images that happen to be in a split, and the seeds that a
model happened to be trained with. An interval that covers one alone is too narrow. `image_draws` and `two_way` resample
both; `paired_t` and `sign_flip` look at seeds alone; `holm` corrects for the number of comparisons made.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_FLIPS = 16
"""Pairs up to which every assignment of signs is tried (65,536 of them); more are drawn at random."""


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


def sign_flip(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Two-sided p of `two - one` if every pair's sign were a coin's; needs no normal distribution. None: no pairs.

    The least p that n pairs can reach is `2 / 2**n`: 0.25 for 3, 0.0625 for 5, 0.0156 for 7 (see `least_p`).
    """
    if len(one) != len(two) or len(one) < 2:
        return None
    differences = np.asarray(two, float) - np.asarray(one, float)
    if len(differences) <= MOST_FLIPS:
        signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    else:
        signs = np.random.default_rng(0).choice((1, -1), size=(1 << MOST_FLIPS, len(differences)))
        signs[0] = 1
    sums = np.abs(signs @ differences)
    return float(np.mean(sums >= sums[0] - 1e-9 * max(1.0, sums[0])))


def least_p(pairs: int) -> float:
    """The smallest p that `sign_flip` can give for so many pairs."""
    return min(1.0, 2.0 ** (1 - min(pairs, MOST_FLIPS)))


def holm(values: Sequence[float]) -> list[float]:
    """Correct p values for all comparisons of one table (Holm, 1979); NaN counts as no comparison and stays."""
    given = np.asarray(values, float)
    corrected = np.full(len(given), np.nan)
    order = [i for i in np.argsort(given, kind="stable") if not np.isnan(given[i])]
    highest = 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * given[i]))
        corrected[i] = highest
    return corrected.tolist()


def detectable(differences: Sequence[float], power: float = 0.8) -> float:
    """The smallest true difference that a paired t-test at 0.05 finds with this power, given the spread of n pairs.

    In the unit of the differences; NaN for fewer than two.
    """
    n = len(differences)
    if n < 2:
        return math.nan
    from scipy.optimize import brentq  # slow to import
    from scipy.stats import chi2, norm, t

    # t of a shifted sample is (z + shift) / sqrt(v / df), v chi-squared: its power as a mean over quantiles of v
    spread = np.sqrt(chi2.ppf((np.arange(2000) + 0.5) / 2000, n - 1) / (n - 1)) * t.ppf(0.975, n - 1)

    def short_of(shift: float) -> float:
        return float(power - np.mean(norm.cdf(shift - spread) + norm.cdf(-shift - spread)))

    found = brentq(short_of, 0, spread.max() + 5)
    return float(found * np.std(differences, ddof=1) / math.sqrt(n))


def image_draws(image_ids: NDArray[np.int64], draws: int, seed: int) -> NDArray[np.float64]:
    """Count every sample in every draw, [draws, samples]: images are drawn with replacement."""
    _, image = np.unique(image_ids, return_inverse=True)
    count = int(image.max()) + 1
    rng = np.random.default_rng(seed)
    times = rng.multinomial(count, np.full(count, 1 / count), size=draws)
    return times[:, image].astype(np.float64)


def two_way(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Draw seeds with replacement on top of drawn images: values [seeds, draws] -> [draws], the mean over drawn seeds.

    values: what every seed gives on every draw of images. The deviations of few seeds are too small and their tails too
    thin; they are widened by sqrt(n / (n - 1)) and by Student's t against the normal at 97.5 %, so that the interval of
    seeds alone would be the t interval. With one seed only images vary.
    """
    seeds, draws = values.shape
    if seeds == 1:
        return values[0]
    from scipy.stats import norm, t  # slow to import

    widen = math.sqrt(seeds / (seeds - 1)) * t.ppf(0.975, seeds - 1) / norm.ppf(0.975)
    mean = values.mean(axis=0)
    chosen = np.random.default_rng(seed).integers(seeds, size=(seeds, draws))
    return mean + widen * np.take_along_axis(values - mean, chosen, axis=0).mean(axis=0)


def two_sided(drawn: NDArray[np.float64]) -> float:
    """Two-sided p of no difference from draws of a difference; never 0, as draws are finite."""
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return math.nan
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(drawn) + 1))
