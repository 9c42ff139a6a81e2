"""How well projections separate chats that show a trait from those that do not: ROC curve and rates at a threshold.

Rows of one question or chat depend on each other, so intervals resample these groups.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import stats
from sklearn.metrics import roc_curve

from persona_lens.monitoring.thresholds import Projections, Threshold, missing_in_words, number_groups, numbers_of
from persona_lens.statistics import N_RESAMPLES, Estimate, auc, mean_estimate, question_resamples, resampled_auc


class RocPoint(NamedTuple):
    """The shares of negatives and of positives above a threshold."""

    fpr: float
    tpr: float
    threshold: float


class Rates(NamedTuple):
    """Shares above one threshold, each with its interval over groups."""

    tpr: Estimate
    fpr: Estimate


@dataclass(frozen=True)
class Detection:
    """How well projections separate positive chats (with the trait) from negative ones. Drawn by `pl.plots.roc`.

    Attributes:
        points: The ROC curve, from nothing above the threshold to everything; corners only.
        auc: The area under it, with its interval over groups.
        best: The point of the highest Youden's J, tpr - fpr; of equals the one with the fewest false positives. Chosen
            on these very rows, so its rates are optimistic.
        n_positive: Number of positive values.
        n_negative: Number of negative values.
        n_groups: Number of groups, which the intervals resample.
    """

    points: tuple[RocPoint, ...] = field(repr=False)
    auc: Estimate
    best: RocPoint
    n_positive: int
    n_negative: int
    n_groups: int
    _positive: tuple[tuple[float, str], ...] = field(repr=False)
    _negative: tuple[tuple[float, str], ...] = field(repr=False)
    _seed: int = field(default=0, repr=False)

    def rates(self, threshold: Threshold | float) -> Rates:
        """True and false positive rate at a threshold that was chosen without these rows.

        Where all or none exceed it, resamples do not vary: the interval is then Clopper and Pearson's, with every group
        as one trial.
        """
        above = threshold.value if isinstance(threshold, Threshold) else threshold
        rates = []
        for side in (self._positive, self._negative):
            values, groups = zip(*side, strict=True)
            exceeding = [float(value > above) for value in values]
            estimate, n = mean_estimate(exceeding, groups, seed=self._seed), len(set(groups))
            if estimate.value in (0.0, 1.0):
                exact = stats.binomtest(n * round(estimate.value), n).proportion_ci(0.95, "exact")
                estimate = estimate._replace(low=float(exact.low), high=float(exact.high))
            rates.append(estimate)
        return Rates(*rates)


def detection(
    positive: Projections,
    negative: Projections,
    *,
    groups: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
    seed: int = 0,
) -> Detection:
    """The ROC curve of projections, with its area and the threshold of Youden's J.

    `groups` names the question or chat of each positive and of each negative value; a group may have values on both
    sides, and intervals resample groups. Memory grows with positive times negative values. Raises ValueError where a
    side is empty or a projection is NaN or infinite. Source: Youden, "Index for Rating Diagnostic Tests", 1950.
    """
    sides = {"positive": numbers_of(positive), "negative": numbers_of(negative)}
    for name, values in sides.items():
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
            shape = list(values.shape)
            raise ValueError(
                f"Expected finite {name} projections [value], got shape {shape}, {missing_in_words(values)}: "
                "pass at least one, and drop what was not measured."
            )
    high, low = sides["positive"], sides["negative"]
    both, sizes = np.concatenate([high, low]), [len(high), len(low)]
    if groups is not None and (n_names := [len(names) for names in groups]) != sizes:
        raise ValueError(
            f"Every value needs its group: expected {sizes[0]} and {sizes[1]}, got {n_names[0]} and {n_names[1]}."
        )
    group, n_groups = number_groups(range(len(both)) if groups is None else [*groups[0], *groups[1]], len(both))
    weights = question_resamples(n_groups, N_RESAMPLES, seed)[:, group]
    resamples = resampled_auc(high, low, weights[:, : len(high)], weights[:, len(high) :])
    area = auc(high, low)
    assert area is not None  # both sides have values
    points = _roc_points(high, low)
    rows = tuple((float(value), str(name)) for value, name in zip(both, group, strict=True))
    return Detection(
        points=points,
        auc=Estimate.of(area, resamples, len(both)),
        best=max(points, key=lambda point: point.tpr - point.fpr),
        n_positive=len(high),
        n_negative=len(low),
        n_groups=n_groups,
        _positive=rows[: len(high)],
        _negative=rows[len(high) :],
        _seed=seed,
    )


def _roc_points(positive: np.ndarray, negative: np.ndarray) -> tuple[RocPoint, ...]:
    """Scikit-learn's curve, its thresholds moved midway to the next value below, so that `>` means what `>=` did."""
    scores = np.concatenate([positive, negative])
    curve = roc_curve(np.repeat([1, 0], [len(positive), len(negative)]), scores)
    below = np.concatenate([[-np.inf], np.unique(scores)])
    points = []
    for fpr, tpr, reached in zip(*curve, strict=True):
        under = below[np.searchsorted(below, reached) - 1]
        middle = under + (reached - under) / 2 if np.isfinite([under, reached]).all() else under
        # Between neighbouring floats there is no other: the middle may round to `reached`.
        threshold = reached if np.isposinf(reached) else middle if middle < reached else under
        points.append(RocPoint(float(fpr), float(tpr), float(threshold)))
    return tuple(points)
