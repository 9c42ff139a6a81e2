"""The few statistics that everything here reports: AUC, rank correlation, and resampling of questions.

Rows of one question are not independent, so intervals resample questions, never rows.
Knows nothing about models or traits: numbers come in, numbers go out.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats


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
