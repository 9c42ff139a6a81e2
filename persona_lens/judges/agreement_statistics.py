"""How far two columns of scores agree: correlations, and Cohen's kappa at a threshold, with intervals over questions.

A resample counts every row as often as it drew the row's question; the weighted formulas here give what scipy and
scikit-learn give for the rows written out that often.
Knows nothing about judges or rollouts: numbers come in, numbers go out.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.metrics import cohen_kappa_score

from persona_lens.statistics import (
    MIN_ROWS,
    N_RESAMPLES,
    SAME,
    Estimate,
    has_correlation,
    pearson,
    question_resamples,
    resampled_means,
    resampled_pearson,
    spearman,
    weighted_correlations,
)

# How many numbers of a resamples-by-rows table are held at once.
TABLE_SIZE = 1_000_000

Scores = Float[np.ndarray, " row"]
Marks = Bool[np.ndarray, " row"]
Weights = Int[np.ndarray, "resample row"]
Resamples = Float[np.ndarray, " resample"]


class AgreementStatistics(NamedTuple):
    """Each is None where it is undefined; `agreeing` is the share of rows on one side of the threshold for both."""

    pearson: Estimate
    spearman: Estimate
    kappa: Estimate
    agreeing: Estimate


def agreement_statistics(
    first: Scores, second: Scores, questions: Int[np.ndarray, " row"], *, threshold: float, seed: int
) -> AgreementStatistics:
    """The statistics of two columns without a gap; `questions` are indices from 0, none left out.

    Undefined are all of them below three rows (the share: without any), a correlation where a side is constant, and
    kappa where both put all rows on the same side of the threshold. An interval needs two questions.
    """
    one, other, n = first >= threshold, second >= threshold, len(first)
    same = (one == other).astype(float)
    values = [pearson(first, second), _spearman(first, second), _kappa(one, other), float(same.mean()) if n else None]
    n_questions = int(questions.max(initial=-1)) + 1
    parts: list[list[np.ndarray]] = [[] for _ in values]
    if n_questions > 1:
        drawn = question_resamples(n_questions, N_RESAMPLES, seed)
        for weights in np.array_split(drawn, 1 + drawn.shape[0] * n // TABLE_SIZE):
            rows = weights[:, questions]
            found = (
                resampled_pearson(first, second, rows),
                resampled_spearman(first, second, rows),
                resampled_kappa(one, other, rows),
                resampled_means(same, questions, weights),
            )
            for part, each in zip(parts, found, strict=True):
                part.append(each)
    resamples = [np.concatenate([np.empty(0), *part]) for part in parts]
    pairs = zip(values, resamples, strict=True)
    return AgreementStatistics(
        *(Estimate.of(float("nan") if value is None else value, each, n) for value, each in pairs)
    )


def _spearman(first: Scores, second: Scores) -> float | None:
    if len(first) < MIN_ROWS or min(np.ptp(first), np.ptp(second)) < SAME:
        return None
    return spearman(first, second)


def _kappa(one: Marks, other: Marks) -> float | None:
    if len(one) < MIN_ROWS or len({*one.tolist(), *other.tolist()}) < 2:
        return None
    return float(cohen_kappa_score(one, other))


def resampled_spearman(first: Scores, second: Scores, weights: Weights) -> Resamples:
    """Spearman's in every resample: Pearson's of the ranks that its rows have in it; NaN where it is undefined."""
    found = weighted_correlations(resampled_ranks(first, weights), resampled_ranks(second, weights), weights)
    return np.where(has_correlation(first, second, weights), found, np.nan)


def resampled_ranks(values: Scores, weights: Weights) -> Float[np.ndarray, "resample row"]:
    """The rank, from 1, of every row that a resample drew, ties sharing the mean of theirs."""
    order = np.argsort(values, kind="stable")
    _, starts, place = np.unique(values[order], return_index=True, return_inverse=True)
    counts = np.add.reduceat(weights[:, order], starts, axis=1)
    below = counts.cumsum(axis=1) - counts
    ranks = np.empty(weights.shape)
    ranks[:, order] = (below + (counts + 1) / 2)[:, place]
    return ranks


def resampled_kappa(one: Marks, other: Marks, weights: Weights) -> Resamples:
    """Cohen's kappa in every resample, of whole counts, so that 0 is 0; NaN where it is undefined.

    With shares, kappa = (observed - expected) / (1 - expected) agreement. Source: Cohen, "A Coefficient of Agreement
    for Nominal Scales", 1960.
    """
    n, first, second = weights.sum(axis=1), weights @ one, weights @ other
    observed = n * (weights @ (one == other))
    expected = first * second + (n - first) * (n - second)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (observed - expected) / (n * n - expected)
    return np.where((n >= MIN_ROWS) & (expected < n * n), found, np.nan)
