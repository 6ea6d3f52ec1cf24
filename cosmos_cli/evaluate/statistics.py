"""Paired differences with intervals, kernel distances, and a correction for many tests. No torch.

Letters: N and M samples, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

import numpy as np

LEVEL = 0.95
PERMUTATIONS = 999
# Exchanges are quick to try, and Holm's correction over many scores needs small p-values.
EXCHANGES = 9999


@dataclass(frozen=True)
class Paired:
    """A score of two models on the same units, such as videos of equal prompt and seed.

    A distance is one number for all units, so it has no interval: it is infinite.

    Args:
        count: the number of units.
        before, after: the mean score of each model.
        low, high: the 95 % confidence interval of the difference after - before.
        p: the two-sided p-value of no difference.
    """

    count: int
    before: float
    after: float
    low: float
    high: float
    p: float

    @property
    def difference(self) -> float:
        """The mean of after - before."""
        return self.after - self.before


def paired(before: Sequence[float], after: Sequence[float]) -> Paired:
    """Return the difference of two models' scores of the same units.

    Scores that are all 0 or 1 are compared by their counts, all others by a t-test. The t interval
    is too narrow if a few units dominate: with 8 exponential differences it covers 89 %.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} and {len(after)} scores are not pairs")
    differences = [b - a for a, b in zip(before, after, strict=True)]
    if not all(map(math.isfinite, differences)):
        raise ValueError(f"scores are not finite: {before} and {after}")
    if {*before, *after} <= {0, 1}:
        interval_and_p = _of_counts(differences.count(1), differences.count(-1), len(before))
    else:
        interval_and_p = _of_numbers(differences)
    return Paired(len(before), fmean(before), fmean(after), *interval_and_p)


def _of_numbers(differences: Sequence[float]) -> tuple[float, float, float]:
    """Return the t interval of the mean of some differences, and the p-value of mean 0."""
    count, mean = len(differences), fmean(differences)
    if count < 2:
        return -math.inf, math.inf, 1.0
    error = float(np.std(differences, ddof=1)) / math.sqrt(count)
    if error == 0:
        # A t-test would be certain. The p-value is that of the signs.
        return mean, mean, 2.0 ** (1 - count) if mean else 1.0
    half = _t_quantile(LEVEL, count - 1) * error
    return mean - half, mean + half, 1 - _t_within(abs(mean) / error, count - 1)


def _of_counts(gained: int, lost: int, count: int) -> tuple[float, float, float]:
    """Return the interval of a difference of shares, and the p-value of McNemar's exact test.

    Half a unit is added to each of the four outcomes, so that the interval has a width even if
    every unit agrees. It is wide where differences are rare.

    Source: Agresti and Min 2005, Simple improved confidence intervals for matched proportions.
    """
    n, changed = count + 2, gained + lost
    centre = (gained - lost) / n
    error = math.sqrt((changed + 1) / n - centre**2) / math.sqrt(n)
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * error
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1)) / 2**changed
    return max(-1.0, centre - half), min(1.0, centre + half), min(1.0, 2 * tail)


def _t_within(t: float, freedom: int) -> float:
    """Return the probability that Student's t lies in [-t, t].

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    within = math.sin(angle) * total
    return min(1.0, 2 / math.pi * (angle + within) if odd else within)


def _t_quantile(share: float, freedom: int) -> float:
    """Return the t for which Student's t lies in [-t, t] with probability `share`."""
    low, high = 0.0, 1.0
    while _t_within(high, freedom) < share:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _t_within(middle, freedom) < share else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values such that any below 0.05 is false on at most 5 % of pages.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _gram(*sets: np.ndarray) -> np.ndarray:
    """Return the kernel of each pair of features of all sets, (x.y / D + 1)^3, as in KID.

    Source: Binkowski et al. 2018, Demystifying MMD GANs.
    """
    both = np.concatenate(sets).astype(np.float64)
    kernel: np.ndarray = (both @ both.T / both.shape[1] + 1) ** 3
    return kernel


def kernel_distance(x_ND: np.ndarray, y_MD: np.ndarray) -> tuple[float, float]:
    """Return the unbiased squared MMD of two sets of features, and its p-value by permutation.

    The distance suits small sets. It is 0 on average for samples of one distribution, so it can be
    negative.
    """
    n, m = len(x_ND), len(y_MD)
    if min(n, m) < 2:
        raise ValueError(f"sets of {n} and {m} features are too small, both need 2")
    gram = _gram(x_ND, y_MD)
    generator = np.random.default_rng(0)
    first = np.arange(n + m) < n
    found = _mmd(gram, first)
    # Rounding must not put a permutation of equal sets above or below what was found.
    least = found - 1e-9 * abs(gram).max()
    others = [_mmd(gram, generator.permutation(first)) for _ in range(PERMUTATIONS)]
    return found, (1 + sum(other >= least for other in others)) / (1 + PERMUTATIONS)


def paired_distances(
    before_ND: np.ndarray, after_ND: np.ndarray, reference_MD: np.ndarray
) -> Paired:
    """Return the kernel distances of two models' paired videos to the same reference.

    The p-value is that of a permutation test: without a difference, the two videos of a prompt
    and seed can be exchanged.
    """
    n, m = len(before_ND), len(reference_MD)
    gram = _gram(before_ND, after_ND, reference_MD)
    # A sample's kernel with itself does not count.
    np.fill_diagonal(gram, 0)
    own, cross = gram[: 2 * n, : 2 * n], gram[: 2 * n, 2 * n :].mean(1)
    within_reference = gram[2 * n :, 2 * n :].sum() / (m * (m - 1))

    def distances(exchanged_KN: np.ndarray) -> np.ndarray:
        """Return the distance of K sets that have the second video of each exchanged pair."""
        chosen = np.concatenate([1 - exchanged_KN, exchanged_KN], axis=1).astype(np.float64)
        within = ((chosen @ own) * chosen).sum(1) / (n * (n - 1))
        return within + within_reference - 2 * chosen @ cross / n

    none = np.zeros((1, n))
    before, after = float(distances(none)[0]), float(distances(1 - none)[0])
    exchanged = np.random.default_rng(0).integers(0, 2, (EXCHANGES, n))
    others = np.abs(distances(1 - exchanged) - distances(exchanged))
    # Rounding must not put an exchange of equal videos above or below what was found.
    least = abs(after - before) - 1e-9 * abs(gram).max()
    p = (1 + int((others >= least).sum())) / (1 + EXCHANGES)
    return Paired(n, before, after, -math.inf, math.inf, p)


def _mmd(gram: np.ndarray, first: np.ndarray) -> float:
    """Return the unbiased squared MMD of the samples in `first` and the rest."""
    n, m = first.sum(), (~first).sum()
    # The sums within and between the sets, without a sample's kernel with itself.
    own, other = gram[first], gram[~first]
    diagonal = np.diagonal(gram)
    within_first = (own[:, first].sum() - diagonal[first].sum()) / (n * (n - 1))
    within_rest = (other[:, ~first].sum() - diagonal[~first].sum()) / (m * (m - 1))
    return float(within_first + within_rest - 2 * own[:, ~first].mean())
