"""The few statistics that everything here reports: AUC, rank correlation, means and slopes with their intervals.

Rows of one question are not independent, so intervals resample questions, never rows.
Knows nothing about models or traits: numbers come in, numbers go out.
"""

from collections.abc import Hashable, Sequence
from math import isnan
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

N_RESAMPLES = 2000
# Beyond so many questions the resamples take gigabytes, and the normal interval is as good.
MAX_RESAMPLED = 5000
MIN_ROWS = 3
# Values closer than this are the same: their difference is rounding.
SAME = 1e-9

Scores = Float[np.ndarray, " row"]
Weights = Int[np.ndarray, "resample row"]
Resamples = Float[np.ndarray, " resample"]


def on_scale(score: float) -> float:
    """A score from 0 to 100 without rounding: 100.00000000000001 is 100 and -1e-14 is 0.

    What is further out than rounding stays as it is, for the caller to refuse.
    """
    ends = (end for end in (0.0, 100.0) if abs(score - end) <= SAME)
    return score if 0 <= score <= 100 else next(ends, score)


class Estimate(NamedTuple):
    """A number with its 95 % bootstrap interval over questions; None where it is undefined.

    An interval needs two questions at least. `n` counts the rows behind it, missing ones left out.
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
        """The value with the central 95 % of its resamples; those that are NaN are left out."""
        if isnan(value):
            return cls(None, None, None, n)
        finite = resamples[np.isfinite(resamples)]
        if len(finite) < 2:
            return cls(value, None, None, n)
        low, high = np.percentile(finite, [2.5, 97.5])
        return cls(value, float(low), float(high), n)


def auc(positive: Any, negative: Any) -> float | None:
    """Area under the ROC curve: how often a positive exceeds a negative, ties counting half; None without both sides.

    Inputs are array-like, 1-D.
    """
    positive, negative = np.asarray(positive, dtype=float), np.asarray(negative, dtype=float)
    if not positive.size or not negative.size:
        return None
    wins = stats.mannwhitneyu(positive, negative, method="asymptotic").statistic
    return float(wins / (positive.size * negative.size))


def resampled_auc(
    positive: np.ndarray, negative: np.ndarray, positive_weights: np.ndarray, negative_weights: np.ndarray
) -> np.ndarray:
    """The AUC with every row counted as often as a resample drew it; weights are [resample, row].

    NaN for a resample that drew no row of a side.
    """
    wins = np.heaviside(positive[:, None] - negative[None, :], 0.5)
    with np.errstate(invalid="ignore"):
        total = positive_weights.sum(axis=1) * negative_weights.sum(axis=1)
        return ((positive_weights @ wins) * negative_weights).sum(axis=1) / total


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float | None:
    """Spearman's rank correlation; None where one side does not vary or there are fewer than three rows."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.asarray(stats.spearmanr(x, y))[0])


def question_resamples(n_questions: int, n_resamples: int, seed: int) -> np.ndarray:
    """How often each bootstrap resample drew each question: integers [resample, question], rows sum to n_questions."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(n_questions, np.full(n_questions, 1 / n_questions), size=n_resamples)


def resampled_means(values: np.ndarray, questions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of rows in every resample of their questions; rows whose value is NaN are missing.

    `values` and `questions` (indices) are [row], `weights` [resample, question]. NaN for a resample without a row.
    """
    counted = ~np.isnan(values)
    n_questions = weights.shape[1]
    sums = np.bincount(questions[counted], weights=values[counted], minlength=n_questions)
    counts = np.bincount(questions[counted], minlength=n_questions)
    with np.errstate(invalid="ignore"):
        return (weights @ sums) / (weights @ counts)


def mean_estimate(
    values: Sequence[float | None] | np.ndarray, questions: Sequence[Hashable] | np.ndarray, *, seed: int = 0
) -> Estimate:
    """The mean of rows, None or NaN being missing, with its interval over questions.

    The interval is a bootstrap's; of more than 5,000 questions it is the normal one of their sums.
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
    """The mean with the interval of a ratio of sums over questions; rows of one question may depend on each other."""
    known = ~np.isnan(values)
    mean, n = float(values[known].mean()), int(known.sum())
    sums = np.bincount(questions[known], weights=values[known] - mean)
    n_questions = len(np.unique(questions[known]))
    error = float(np.sqrt(n_questions / max(n_questions - 1, 1) * (sums**2).sum()) / n)
    reach = float(stats.norm.ppf(0.975)) * error
    return Estimate(mean, mean - reach, mean + reach, n)


def slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares slope of each row of `y` [resample, point] on `x` [point]; NaN where a point is."""
    centred = x - x.mean()
    return (y @ centred) / (centred @ centred)


def pearson(first: Scores, second: Scores) -> float | None:
    """Pearson's correlation; None where one side does not vary or there are fewer than three rows."""
    if len(first) < MIN_ROWS or min(np.ptp(first), np.ptp(second)) < SAME:
        return None
    return float(np.asarray(stats.pearsonr(first, second))[0])


def resampled_pearson(first: Scores, second: Scores, weights: Weights) -> Resamples:
    """Pearson's correlation in every resample; NaN where it is undefined."""
    found = weighted_correlations(
        np.broadcast_to(first, weights.shape), np.broadcast_to(second, weights.shape), weights
    )
    return np.where(has_correlation(first, second, weights), found, np.nan)


def weighted_correlations(
    x: Float[np.ndarray, "resample row"], y: Float[np.ndarray, "resample row"], weights: Weights
) -> Resamples:
    """Weighted Pearson correlations, by deviations from each resample's own mean, as squares of scores would cancel."""
    n = weights.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        dx, dy = (side - (weights * side).sum(axis=1, keepdims=True) / n for side in (x, y))
        of = {"xy": (dx, dy), "xx": (dx, dx), "yy": (dy, dy)}
        sums = {name: np.einsum("ij,ij,ij->i", weights, *sides) for name, sides in of.items()}
        return np.clip(sums["xy"] / (np.sqrt(sums["xx"]) * np.sqrt(sums["yy"])), -1, 1)


def has_correlation(first: Scores, second: Scores, weights: Weights) -> Bool[np.ndarray, " resample"]:
    """Where a resample has three rows, and neither side is constant in it."""
    enough = weights.sum(axis=1) >= MIN_ROWS
    for side in (first, second):
        drawn_high = np.where(weights > 0, side, -np.inf).max(axis=1, initial=-np.inf)
        drawn_low = np.where(weights > 0, side, np.inf).min(axis=1, initial=np.inf)
        enough &= drawn_high - drawn_low >= SAME
    return enough
