"""TF-IDF features of text and the regression on them, and how well both tell held-out texts apart.

Texts that share a group, such as a prompt, are held out together, since they are not independent.
Knows nothing about judges or files.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from persona_lens.statistics import auc, question_resamples

N_FOLDS = 5
N_RESAMPLES = 200
MIN_TEXTS_PER_TERM = 2
# How text becomes numbers is part of the classifier's file format: a change here is a new format version.
READING = {"token_pattern": r"(?u)\b\w\w+\b", "ngram_range": [1, 2], "sublinear_tf": True, "norm": "l2"}


@dataclass(frozen=True)
class CrossValidation:
    """How well classifiers fitted on the other groups of texts tell the held-out ones apart.

    `auc` pools the probabilities of all folds, and [`low`, `high`] is its 95 % interval over resampled groups; None
    where a side could not be scored at all. `n_unscored` texts had no term known to their fold and are left out.
    """

    auc: float | None
    low: float | None
    high: float | None
    n_positive: int
    n_negative: int
    n_unscored: int
    n_groups: int
    n_folds: int

    def __str__(self) -> str:
        missing = self.auc is None or self.low is None
        found = "none" if missing else f"{self.auc:.3f} (95 % {self.low:.3f} to {self.high:.3f})"
        return (
            f"AUC {found} on held-out groups: {self.n_positive} positive and {self.n_negative} negative texts, "
            f"{self.n_unscored} unscored, {self.n_groups} groups, {self.n_folds} folds"
        )


def number_groups(groups: Sequence[Hashable], is_positive: np.ndarray, labels: tuple[str, str]) -> np.ndarray:
    """The groups as numbers from 0; raises ValueError where a side cannot be spread over the folds."""
    if len(groups) != len(is_positive):
        raise ValueError(f"Expected one group a text, {len(is_positive)} in all, got {len(groups)}.")
    order: dict[Hashable, int] = {}
    numbered = np.array([order.setdefault(group, len(order)) for group in groups], dtype=int)
    for label, side in zip(labels, (is_positive, ~is_positive), strict=True):
        if (found := len(set(numbered[side].tolist()))) < N_FOLDS:
            raise ValueError(
                f"Cross-validation needs {label} texts in {N_FOLDS} different groups at least, got {int(side.sum())} "
                f"texts in {found}: add texts (identical ones are one group)."
            )
    return numbered


def make_vectorizer(**settings: Any) -> Any:
    """A TF-IDF vectorizer that reads text by `READING`."""
    return TfidfVectorizer(**cast(Any, {**READING, "ngram_range": tuple(READING["ngram_range"])} | settings))


def terms_per_row(features: Any) -> np.ndarray:
    """How many different known terms each row has."""
    # A known term never has the value 0: an idf is 1 at least.
    return np.diff(features.indptr)


def fit_regression(texts: Sequence[str], is_positive: np.ndarray) -> tuple[Any, Any]:
    """The vectorizer and the regression fitted on its features, both sides weighing the same."""
    vectorizer = make_vectorizer(min_df=MIN_TEXTS_PER_TERM)
    try:
        features = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise ValueError(
            f"No word of two letters or more occurs in {MIN_TEXTS_PER_TERM} of the {len(texts)} texts: fit on more."
        ) from error
    # Features of unit length spread over many terms: at scikit-learn's own C = 1 all probabilities crowd the middle.
    regression = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000)
    return vectorizer, regression.fit(features, is_positive)


def cross_validate(texts: list[str], is_positive: np.ndarray, groups: np.ndarray, seed: int) -> CrossValidation:
    """Fit on the other folds and score each one, groups being held out whole."""
    held_out = np.full(len(texts), np.nan)
    # Stratified, because a pooled AUC is biased downwards where the folds' shares of positives differ.
    folds = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=seed)
    for train, test in folds.split(np.zeros(len(texts)), is_positive, groups):
        vectorizer, regression = fit_regression([texts[row] for row in train], is_positive[train])
        features = vectorizer.transform([texts[row] for row in test])
        found = regression.predict_proba(features)[:, 1]
        held_out[test] = np.where(terms_per_row(features) > 0, found, np.nan)
    scored = ~np.isnan(held_out)
    n_groups = int(groups.max()) + 1
    low, high = _interval(held_out[scored], is_positive[scored], groups[scored], n_groups, seed)
    return CrossValidation(
        auc=auc(held_out[scored & is_positive], held_out[scored & ~is_positive]),
        low=low,
        high=high,
        n_positive=int(is_positive.sum()),
        n_negative=int((~is_positive).sum()),
        n_unscored=int((~scored).sum()),
        n_groups=n_groups,
        n_folds=N_FOLDS,
    )


def _interval(
    probabilities: np.ndarray, is_positive: np.ndarray, groups: np.ndarray, n_groups: int, seed: int
) -> tuple[float, float] | tuple[None, None]:
    weights = question_resamples(n_groups, N_RESAMPLES, seed)[:, groups]
    drawn = [row for row in weights if row[is_positive].any() and row[~is_positive].any()]
    if not drawn:
        return None, None
    # Not `resampled_auc`: it holds a table of all pairs of texts, and labelled sets can be large.
    found = [float(roc_auc_score(is_positive, probabilities, sample_weight=row)) for row in drawn]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
