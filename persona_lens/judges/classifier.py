"""Judges by words: a classifier fitted on labelled text, and a sentiment lexicon. Neither runs a language model.

The classifier is a logistic regression on TF-IDF features: p = sigmoid(b + w · x), where x has (1 + log count) * idf
for each known word and pair of neighbouring words, scaled to unit length; the trait score is 100 * p, fitted as if both
labels were equally common. Cross-validation holds out whole groups of texts, such as the answers to one prompt.
Limits: it ignores word order and intensity. Topics and manners of speech that go with a label in its texts count as
signs of it, text from another source may have others, and degrees of the label are followed poorly.
"""

import hashlib
import json
import os
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.numpy
from jaxtyping import Float64, Int
from safetensors import SafetensorError, safe_open
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from persona_lens.judges.scores import Score
from persona_lens.rollouts.rows import Rollout
from persona_lens.statistics import auc, question_resamples
from persona_lens.storage.files import DAMAGE, write_whole
from persona_lens.storage.text import missing_package
from persona_lens.traits.trait import Trait

N_FOLDS = 5
N_RESAMPLES = 200
MIN_TEXTS_PER_TERM = 2
# The tokenisation is part of the classifier's file format: a change here is a new format version.
READING = {"token_pattern": r"(?u)\b\w\w+\b", "ngram_range": [1, 2], "sublinear_tf": True, "norm": "l2"}


@dataclass(frozen=True)
class CrossValidation:
    """How well classifiers that were fitted on the other groups of texts separate the held-out ones.

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
        auc = "none" if missing else f"{self.auc:.3f} (95 % {self.low:.3f} to {self.high:.3f})"
        return (
            f"AUC {auc} on held-out groups: {self.n_positive} positive and {self.n_negative} negative texts, "
            f"{self.n_unscored} unscored, {self.n_groups} groups, {self.n_folds} folds"
        )


def _number_groups(groups: Sequence[Hashable], is_positive: np.ndarray, labels: tuple[str, str]) -> np.ndarray:
    """The groups as numbers from 0; raises ValueError where a side has too few for the folds."""
    if len(groups) != len(is_positive):
        raise ValueError(f"Expected one group a text, {len(is_positive)} in all, got {len(groups)}.")
    order: dict[Hashable, int] = {}
    numbered = np.array([order.setdefault(group, len(order)) for group in groups], dtype=int)
    for label, side in zip(labels, (is_positive, ~is_positive), strict=True):
        if (count := len(set(numbered[side].tolist()))) < N_FOLDS:
            raise ValueError(
                f"Cross-validation needs {label} texts in {N_FOLDS} different groups at least, got {int(side.sum())} "
                f"texts in {count}: add texts (identical ones are one group)."
            )
    return numbered


def _make_vectorizer(**settings: Any) -> Any:
    return TfidfVectorizer(**cast(Any, {**READING, "ngram_range": tuple(READING["ngram_range"])} | settings))


def _terms_per_row(features: Any) -> np.ndarray:
    """How many different known terms each row has: none has the value 0, since an idf is at least 1."""
    return np.diff(features.indptr)


def _fit_regression(texts: Sequence[str], is_positive: np.ndarray) -> tuple[Any, Any]:
    """The vectorizer, and the regression on its features with equal weight for both sides."""
    vectorizer = _make_vectorizer(min_df=MIN_TEXTS_PER_TERM)
    try:
        features = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise ValueError(
            f"No word of two letters or more occurs in {MIN_TEXTS_PER_TERM} of the {len(texts)} texts: fit on more."
        ) from error
    # Features of unit length spread over many terms: at scikit-learn's own C = 1 all probabilities crowd the middle.
    regression = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000)
    return vectorizer, regression.fit(features, is_positive)


def _cross_validate(texts: list[str], is_positive: np.ndarray, groups: np.ndarray, seed: int) -> CrossValidation:
    """Score each fold with a fit on the others, holding out whole groups."""
    held_out = np.full(len(texts), np.nan)
    # Stratified, because unequal shares of positives in the folds bias a pooled AUC downwards.
    folds = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=seed)
    for train, test in folds.split(np.zeros(len(texts)), is_positive, groups):
        vectorizer, regression = _fit_regression([texts[row] for row in train], is_positive[train])
        features = vectorizer.transform([texts[row] for row in test])
        probabilities = regression.predict_proba(features)[:, 1]
        held_out[test] = np.where(_terms_per_row(features) > 0, probabilities, np.nan)
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
    resampled = [float(roc_auc_score(is_positive, probabilities, sample_weight=row)) for row in drawn]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


FORMAT_VERSION = 1
_HEADER = "persona_lens_classifier"


@dataclass(frozen=True, eq=False)
class TextClassifier:
    """A fitted classifier of text; `labels` name its positive and its negative side."""

    terms: tuple[str, ...]
    idf: Float64[np.ndarray, " term"]
    coefficients: Float64[np.ndarray, " term"]
    intercept: float
    labels: tuple[str, str]
    validation: CrossValidation

    def __post_init__(self) -> None:
        shapes = {(len(set(self.terms)),), self.idf.shape, self.coefficients.shape}
        if shapes != {(len(self.terms),)} or not self.terms:
            raise ValueError(
                f"A classifier has different terms, each with one idf and coefficient; got {len(self.terms)} terms, "
                f"{len(set(self.terms))} different, idf {self.idf.shape} and coefficients {self.coefficients.shape}."
            )
        if not np.isfinite(self._weights).all():
            raise ValueError("A classifier's weights are finite numbers; got NaN or infinity.")

    @classmethod
    def fit(
        cls,
        positive: Sequence[str],
        negative: Sequence[str],
        *,
        groups: Sequence[Hashable] | None = None,
        labels: tuple[str, str] = ("positive", "negative"),
        seed: int = 0,
    ) -> "TextClassifier":
        """Fit on texts of two sides, with equal weight for both, and cross-validate.

        Args:
            positive: Texts that show the trait.
            negative: Texts that do not.
            groups: One value a text, the positive ones' first, equal for dependent texts such as those of one prompt.
                A group is held out whole. By default every text is a group, and identical texts are one.
            labels: Names of the sides.
            seed: Draws the folds and the resamples; the weights do not depend on it.

        Raises:
            ValueError: A side has too few texts or groups, a text is blank or not a string, or no term is shared.
        """
        texts = _check_texts(positive, labels[0]) + _check_texts(negative, labels[1])
        if blank := sum(not text.strip() for text in texts):
            raise ValueError(f"{blank} of the {len(texts)} texts are blank and teach nothing: leave them out.")
        is_positive = np.arange(len(texts)) < len(positive)
        numbered = _number_groups(texts if groups is None else groups, is_positive, labels)
        vectorizer, regression = _fit_regression(texts, is_positive)
        return cls(
            terms=tuple(vectorizer.get_feature_names_out().tolist()),
            idf=vectorizer.idf_,
            coefficients=regression.coef_[0],
            intercept=float(cast(Any, regression.intercept_)[0]),
            labels=labels,
            validation=_cross_validate(texts, is_positive, numbered, seed),
        )

    def probability(self, texts: Sequence[str]) -> Float64[np.ndarray, " text"]:
        """The probability of the positive label; NaN for a text without a known term, such as an empty one."""
        features = self._features(texts)
        probabilities = expit(features @ self.coefficients + self.intercept)
        return np.where(_terms_per_row(features) > 0, probabilities, np.nan)

    def known_terms(self, texts: Sequence[str]) -> Int[np.ndarray, " text"]:
        """The number of different known words and pairs of words in each text."""
        return _terms_per_row(self._features(texts))

    @cached_property
    def weights_hash(self) -> str:
        """Twelve hexadecimal digits that change with the weights, the terms and the labels."""
        digest = hashlib.sha256(json.dumps([self.terms, self.labels, READING]).encode())
        digest.update(self._weights.astype("<f8").tobytes())
        return digest.hexdigest()[:12]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one `.safetensors` file; an older file of that name stays until the new one is whole.

        Raises:
            ValueError: The name does not end in `.safetensors`.
            OSError: The folder is missing or cannot be written to.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(
                f"A classifier is saved as .safetensors, got {path.name!r}: change the ending of the name."
            )
        header = {"format_version": FORMAT_VERSION, "reading": READING, "labels": self.labels, "terms": self.terms}
        header["validation"] = asdict(self.validation)
        tensors = {"idf": self.idf, "coefficients": self.coefficients, "intercept": np.array([self.intercept])}
        contents = safetensors.numpy.save(tensors, metadata={_HEADER: json.dumps(header, allow_nan=False)})
        write_whole(path, contents)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TextClassifier":
        """The classifier that `save` wrote; its probabilities are the same to the bit.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is cut short, damaged, foreign, or of another format version.
        """
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (cannot be iterated over)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}): copy it or save it again.") from error
        if _HEADER not in metadata:
            raise ValueError(f"{path} holds no text classifier: name a file that TextClassifier.save wrote.")
        try:
            header = json.loads(metadata[_HEADER])
            if (written := header["format_version"]) == FORMAT_VERSION:
                return cls._from_parts(header, tensors)
        except DAMAGE as error:
            raise ValueError(f"{path} has damaged contents ({error!r}): copy it or save it again.") from error
        raise ValueError(
            f"{path} has format version {written}, and this persona_lens reads {FORMAT_VERSION}: "
            "install the persona_lens that wrote it, or a newer one."
        )

    @classmethod
    def _from_parts(cls, header: dict[str, Any], tensors: dict[str, np.ndarray]) -> "TextClassifier":
        if header["reading"] != READING:
            raise ValueError(f"it reads text by {header['reading']}, and this format by {READING}")
        positive, negative = _check_texts(header["labels"], "label")
        return cls(
            terms=tuple(_check_texts(header["terms"], "term")),
            idf=tensors["idf"].astype(np.float64),
            coefficients=tensors["coefficients"].astype(np.float64),
            intercept=float(tensors["intercept"][0]),
            labels=(positive, negative),
            validation=CrossValidation(**header["validation"]),
        )

    @property
    def _weights(self) -> np.ndarray:
        return np.concatenate([self.idf, self.coefficients, [self.intercept]])

    @cached_property
    def _vectorizer(self) -> Any:
        vectorizer = _make_vectorizer(vocabulary=self.terms)
        vectorizer.idf_ = self.idf
        return vectorizer

    def _features(self, texts: Sequence[str]) -> Any:
        checked = _check_texts(texts, "given")
        # scikit-learn refuses an empty list.
        return self._vectorizer.transform(checked) if checked else csr_matrix((0, len(self.terms)))


class ClassifierJudge:
    """Judges by a text classifier, which shares no weights with the model that wrote the text; gives no coherence.

    It scores for the positive label whatever the trait is: pass a classifier of that trait. A response without a known
    term has no trait score.
    """

    def __init__(self, classifier: TextClassifier, *, batch_size: int = 1000):
        self.classifier = classifier
        self.batch_size = batch_size

    def name(self, trait: Trait) -> str:
        """The classifier's labels and the hash of its weights."""
        positive, negative = self.classifier.labels
        return f"text classifier of {positive} against {negative} (weights {self.classifier.weights_hash})"

    def score(self, trait: Trait, rollouts: Sequence[Rollout], *, progress: bool = False) -> list[Score]:
        """Score rollouts by their responses; evidence is the number of known terms."""
        texts = [row.response for row in rollouts]
        probabilities = self.classifier.probability(texts).tolist()
        counts = self.classifier.known_terms(texts).tolist()
        return [
            Score(None, None)
            if row.is_empty
            else Score(100 * probability if count else None, None, {"known_terms": float(count)})
            for row, probability, count in zip(rollouts, probabilities, counts, strict=True)
        ]


def _check_texts(texts: Sequence[str], label: str) -> list[str]:
    if isinstance(texts, str):
        raise ValueError(f"Expected a list of {label} texts, got one string: put it into a list.")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{label} text {number} is no string but {type(text).__name__}: pass responses as text.")
    return list(texts)


class SentimentJudge:
    """Judges by the VADER sentiment lexicon: 0 unpleasant, 50 neutral, 100 pleasant; gives no coherence.

    The simplest control for a trait such as `optimistic`. Score = 50 * (1 + compound): the valences of the words in the
    lexicon, adjusted for negation, degree and emphasis by rules, sum to s, and compound = s / sqrt(s² + 15).

    Limits: it counts words, so it neither understands a sentence nor notices gibberish; it saturates on long text,
    where a few sentences in one mood already score near 0 or 100; text without a word of its lexicon, in any other
    language than English for instance, scores 50. It knows valence and nothing else, so it is a control for
    valence-like traits (optimistic, impolite) and says nothing about others (sycophantic, hallucinating).
    Source: Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
    ICWSM 2014.

    Raises:
        ImportError: The package vaderSentiment is not installed.
    """

    def __init__(self, *, batch_size: int = 1000):
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise missing_package("SentimentJudge", "vaderSentiment", extra="embedded") from error
        self.batch_size = batch_size
        self._analyzer = SentimentIntensityAnalyzer()

    def name(self, trait: Trait) -> str:
        """The lexicon and its version."""
        return f"VADER sentiment lexicon (vaderSentiment {version('vaderSentiment')})"

    def score(self, trait: Trait, rollouts: Sequence[Rollout], *, progress: bool = False) -> list[Score]:
        """Score rollouts by their responses; an empty one has no score.

        Evidence is the compound valence and the shares of pleasant and unpleasant words.
        """
        return [Score(None, None) if row.is_empty else self._score(row.response) for row in rollouts]

    def _score(self, text: str) -> Score:
        valence = self._analyzer.polarity_scores(text)
        evidence = {"compound": valence["compound"], "pleasant": valence["pos"], "unpleasant": valence["neg"]}
        return Score(50 * (1 + valence["compound"]), None, evidence)
