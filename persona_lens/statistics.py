"""The statistics that results report: means, slopes, correlations and AUC, with intervals.

Rows of one question are not independent, so intervals resample questions, never rows.
"""

from collections.abc import Hashable, Sequence
from math import isnan
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

N_RESAMPLES = 2000
# With more questions the resamples take gigabytes, and the normal interval is as good.
MAX_RESAMPLED = 5000
MIN_ROWS = 3
# A smaller difference between two values is rounding.
SAME = 1e-9

Scores = Float[np.ndarray, " row"]
Weights = Int[np.ndarray, "resample row"]
Resamples = Float[np.ndarray, " resample"]


def on_scale(score: float) -> float:
    """A score with rounding beyond the ends of 0 to 100 removed: 100.00000000000001 becomes 100, -1e-14 becomes 0.

    Scores that are further outside are returned unchanged, for the caller to refuse.
    """
    ends = (end for end in (0.0, 100.0) if abs(score - end) <= SAME)
    return score if 0 <= score <= 100 else next(ends, score)


class Estimate(NamedTuple):
    """A number with its 95 % bootstrap interval over questions; None where undefined.

    An interval needs at least two questions. `n` is the number of rows, without missing ones.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        return f"{self.value:.1f}" + ("" if self.low is None else f" [{self.low:.1f}, {self.high:.1f}]")

    @classmethod
    def of(cls, value: float, resamples: np.ndarray, n: int) -> "Estimate":
        """The value with the central 95 % of its resamples, ignoring NaN."""
        if isnan(value):
            return cls(None, None, None, n)
        finite = resamples[np.isfinite(resamples)]
        if len(finite) < 2:
            return cls(value, None, None, n)
        low, high = np.percentile(finite, [2.5, 97.5])
        return cls(value, float(low), float(high), n)


def auc(positive: Any, negative: Any) -> float | None:
    """Area under the ROC curve: how often a positive exceeds a negative, with ties as half; None if a side is empty.

    Both arguments are one-dimensional and array-like.
    """
    positive, negative = np.asarray(positive, dtype=float), np.asarray(negative, dtype=float)
    if not positive.size or not negative.size:
        return None
    wins = stats.mannwhitneyu(positive, negative, method="asymptotic").statistic
    return float(wins / (positive.size * negative.size))


def resampled_auc(
    positive: np.ndarray, negative: np.ndarray, positive_weights: np.ndarray, negative_weights: np.ndarray
) -> np.ndarray:
    """The AUC in every resample; weights are [resample, row]. NaN for a resample that drew no row of a side."""
    wins = np.heaviside(positive[:, None] - negative[None, :], 0.5)
    with np.errstate(invalid="ignore"):
        total = positive_weights.sum(axis=1) * negative_weights.sum(axis=1)
        return ((positive_weights @ wins) * negative_weights).sum(axis=1) / total


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float | None:
    """Spearman's rank correlation; None if a side does not vary or there are fewer than three rows."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.asarray(stats.spearmanr(x, y))[0])


def question_resamples(n_questions: int, n_resamples: int, seed: int) -> np.ndarray:
    """How often each bootstrap resample draws each question: integers [resample, question]; rows sum to n_questions."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(n_questions, np.full(n_questions, 1 / n_questions), size=n_resamples)


def resampled_means(values: np.ndarray, questions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of rows in every resample of their questions, without rows whose value is NaN.

    `values` and `questions` (indices) are [row], `weights` [resample, question]. NaN for a resample without rows.
    """
    present = ~np.isnan(values)
    n_questions = weights.shape[1]
    sums = np.bincount(questions[present], weights=values[present], minlength=n_questions)
    counts = np.bincount(questions[present], minlength=n_questions)
    with np.errstate(invalid="ignore"):
        return (weights @ sums) / (weights @ counts)


def mean_estimate(
    values: Sequence[float | None] | np.ndarray, questions: Sequence[Hashable] | np.ndarray, *, seed: int = 0
) -> Estimate:
    """The mean of rows, without missing ones (None or NaN), with its interval over questions.

    It is a bootstrap interval; for more than 5,000 questions, the normal one of their sums.
    """
    numbers = np.array([np.nan if value is None else value for value in values], dtype=float)
    n = int((~np.isnan(numbers)).sum())
    if n == 0:
        return Estimate(None, None, None, 0)
    names = list(dict.fromkeys(questions))
    if len(names) < 2:
        return Estimate(float(np.nanmean(numbers)), None, None, n)
    place = {name: index for index, name in enumerate(names)}
    index = np.array([place[question] for question in questions])
    if len(names) > MAX_RESAMPLED:
        return _normal_mean(numbers, index)
    resamples = resampled_means(numbers, index, question_resamples(len(names), N_RESAMPLES, seed))
    return Estimate.of(float(np.nanmean(numbers)), resamples, n)


def _normal_mean(values: Scores, questions: Int[np.ndarray, " row"]) -> Estimate:
    """The mean with the normal interval of a ratio of sums over questions."""
    present = ~np.isnan(values)
    mean, n = float(values[present].mean()), int(present.sum())
    sums = np.bincount(questions[present], weights=values[present] - mean)
    n_questions = len(np.unique(questions[present]))
    error = float(np.sqrt(n_questions / max(n_questions - 1, 1) * (sums**2).sum()) / n)
    reach = float(stats.norm.ppf(0.975)) * error
    return Estimate(mean, mean - reach, mean + reach, n)


def slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares slope of each row of `y` [resample, point] on `x` [point]; NaN if one of its points is."""
    centred = x - x.mean()
    return (y @ centred) / (centred @ centred)


def pearson(first: Scores, second: Scores) -> float | None:
    """Pearson's correlation; None if a side does not vary or there are fewer than three rows."""
    if len(first) < MIN_ROWS or min(np.ptp(first), np.ptp(second)) < SAME:
        return None
    return float(np.asarray(stats.pearsonr(first, second))[0])


def resampled_pearson(first: Scores, second: Scores, weights: Weights) -> Resamples:
    """Pearson's correlation in every resample; NaN where undefined."""
    x, y = (np.broadcast_to(side, weights.shape) for side in (first, second))
    return np.where(has_correlation(first, second, weights), weighted_correlations(x, y, weights), np.nan)


def weighted_correlations(
    x: Float[np.ndarray, "resample row"], y: Float[np.ndarray, "resample row"], weights: Weights
) -> Resamples:
    """Weighted Pearson correlations [resample]."""
    n = weights.sum(axis=1, keepdims=True)
    # From deviations from each resample's mean: differences of large squares would cancel.
    with np.errstate(invalid="ignore", divide="ignore"):
        dx, dy = (side - (weights * side).sum(axis=1, keepdims=True) / n for side in (x, y))
        of = {"xy": (dx, dy), "xx": (dx, dx), "yy": (dy, dy)}
        sums = {name: np.einsum("ij,ij,ij->i", weights, *sides) for name, sides in of.items()}
        return np.clip(sums["xy"] / (np.sqrt(sums["xx"]) * np.sqrt(sums["yy"])), -1, 1)


def has_correlation(first: Scores, second: Scores, weights: Weights) -> Bool[np.ndarray, " resample"]:
    """Whether a resample has three rows or more, and both sides vary in it."""
    enough = weights.sum(axis=1) >= MIN_ROWS
    for side in (first, second):
        drawn_high = np.where(weights > 0, side, -np.inf).max(axis=1, initial=-np.inf)
        drawn_low = np.where(weights > 0, side, np.inf).min(axis=1, initial=np.inf)
        enough &= drawn_high - drawn_low >= SAME
    return enough
