"""The distortion bound behind the random projections (Johnson & Lindenstrauss; the AML paper's theorem).

The theorem: a Gaussian map to D dimensions, entries N(0, 1/D), keeps all squared distances between n points within a
factor 1 +- epsilon. It holds inside one modality, and for concatenated pairs (v, t) under the block-diagonal map of the
two matrices. It does not cover inner products `<Wi v, Wt t>` across modalities: with independent matrices those
have mean 0 and variance `|v|^2 |t|^2 / D`, whatever v and t are.
"""

import math


def failure_probability(points: int, dim: int, epsilon: float) -> float:
    """Bound on the probability that any of the n (n - 1) / 2 squared distances leaves 1 +- epsilon; at most 1.

    Chi-square tails (Dasgupta & Gupta, 2003): `2 exp(-D / 4 (epsilon^2 - 2/3 epsilon^3))` for each pair, then a sum.
    epsilon in (0, 1).
    """
    pairs = points * (points - 1) / 2
    return min(1.0, pairs * 2 * math.exp(-dim / 4 * (epsilon**2 - 2 / 3 * epsilon**3)))


def distortion_bound(points: int, dim: int, probability: float = 0.95) -> float:
    """Smallest epsilon in (0, 1) that all squared distances between n points keep to with at least this probability.

    1.0 when the dimension is too small for any.
    """
    low, high = 0.0, 1.0
    if failure_probability(points, dim, high) > 1 - probability:
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if failure_probability(points, dim, middle) > 1 - probability:
            low = middle
        else:
            high = middle
    return high


def required_dim(points: int, epsilon: float, probability: float = 0.95) -> int:
    """Smallest D that keeps all squared distances between n points within 1 +- epsilon with this probability."""
    pairs = points * (points - 1) / 2
    return math.ceil(4 / (epsilon**2 - 2 / 3 * epsilon**3) * math.log(2 * pairs / (1 - probability)))
