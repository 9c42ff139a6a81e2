"""Compare two judges on the same rollouts, or a judge with people.

Pearson's and Spearman's correlation of the scores, and Cohen's kappa for which answers score at least the threshold;
with 95 % intervals over questions. A row that lacks a score is counted, never compared. A resample weights every row by
how often it drew the row's question; the weighted formulas give what scipy and scikit-learn give for repeated rows.
"""

import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.metrics import cohen_kappa_score

from persona_lens.judges.scores import ScoredRollout
from persona_lens.rollouts.rows import Rollout
from persona_lens.statistics import (
    MIN_ROWS,
    N_RESAMPLES,
    SAME,
    Estimate,
    has_correlation,
    on_scale,
    pearson,
    question_resamples,
    resampled_means,
    resampled_pearson,
    spearman,
    weighted_correlations,
)

if TYPE_CHECKING:
    import pandas

TABLE_SIZE = 1_000_000
"""Numbers of a resamples-by-rows table in memory at once."""

Scores = Float[np.ndarray, " row"]
Marks = Bool[np.ndarray, " row"]
Weights = Int[np.ndarray, "resample row"]
Resamples = Float[np.ndarray, " resample"]


class AgreementStatistics(NamedTuple):
    """`agreeing` is the share of rows that are on the same side of the threshold for both."""

    pearson: Estimate
    spearman: Estimate
    kappa: Estimate
    agreeing: Estimate


def agreement_statistics(
    first: Scores, second: Scores, questions: Int[np.ndarray, " row"], *, threshold: float, seed: int
) -> AgreementStatistics:
    """The statistics of two columns without missing scores; `questions` are indices from 0, none left out.

    All are undefined below three rows (the share: without any), a correlation also where a side is constant, and kappa
    where both put all rows on the same side of the threshold. An interval needs two questions.
    """
    one, other, n = first >= threshold, second >= threshold, len(first)
    same = (one == other).astype(float)
    values = [pearson(first, second), _spearman(first, second), _kappa(one, other), float(same.mean()) if n else None]
    n_questions = int(questions.max(initial=-1)) + 1
    parts: list[tuple[np.ndarray, ...]] = []
    if n_questions > 1:
        drawn = question_resamples(n_questions, N_RESAMPLES, seed)
        for weights in np.array_split(drawn, 1 + drawn.shape[0] * n // TABLE_SIZE):
            rows = weights[:, questions]
            parts.append(
                (
                    resampled_pearson(first, second, rows),
                    resampled_spearman(first, second, rows),
                    resampled_kappa(one, other, rows),
                    resampled_means(same, questions, weights),
                )
            )
    resamples = [np.concatenate(part) for part in zip(*parts, strict=True)] if parts else [np.empty(0)] * 4
    pairs = zip(values, resamples, strict=True)
    return AgreementStatistics(
        *(Estimate.of(float("nan") if value is None else value, drawn, n) for value, drawn in pairs)
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
    """Spearman's correlation in every resample: Pearson's of the ranks within it; NaN where it is undefined."""
    correlations = weighted_correlations(resampled_ranks(first, weights), resampled_ranks(second, weights), weights)
    return np.where(has_correlation(first, second, weights), correlations, np.nan)


def resampled_ranks(values: Scores, weights: Weights) -> Float[np.ndarray, "resample row"]:
    """The rank, from 1, of every row within each resample; ties share their mean rank."""
    order = np.argsort(values, kind="stable")
    _, starts, place = np.unique(values[order], return_index=True, return_inverse=True)
    counts = np.add.reduceat(weights[:, order], starts, axis=1)
    below = counts.cumsum(axis=1) - counts
    ranks = np.empty(weights.shape)
    ranks[:, order] = (below + (counts + 1) / 2)[:, place]
    return ranks


def resampled_kappa(one: Marks, other: Marks, weights: Weights) -> Resamples:
    """Cohen's kappa in every resample, from integer counts, so that 0 is exactly 0; NaN where it is undefined.

    With shares, kappa = (observed - expected) / (1 - expected) agreement. Source: Cohen, "A Coefficient of Agreement
    for Nominal Scales", 1960.
    """
    n, first, second = weights.sum(axis=1), weights @ one, weights @ other
    observed = n * (weights @ (one == other))
    expected = first * second + (n - first) * (n - second)
    with np.errstate(invalid="ignore", divide="ignore"):
        kappas = (observed - expected) / (n * n - expected)
    return np.where((n >= MIN_ROWS) & (expected < n * n), kappas, np.nan)


def read_human_scores(path: str | Path, rollouts: Sequence[Rollout], column: str) -> list[float | None]:
    """Scores by people, 0 to 100, from `column` of a CSV file, in the rollouts' order; None for a missing score.

    The file has a column `key` (`Rollout.key`), or else `question` and `response`, where line ends and outer spaces do
    not matter and a row scores every rollout with its text. Errors count rows as spreadsheets do: the names of the
    columns are row 1.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no CSV file, a column is absent, a row matches no rollout, two rows score the same text
            differently, or a score is not a number from 0 to 100.
    """
    table = _read(Path(path), column)
    names = ("key",) if "key" in table.columns else ("question", "response")
    texts = [_text(*(getattr(rollout, name) for name in names)) for rollout in rollouts]
    expected = set(texts)
    scores: dict[tuple[str, ...], tuple[float | None, int]] = {}
    strangers: list[int] = []
    for row, cells in enumerate(table.to_dict("records"), start=2):
        if not any(cells.values()):
            continue
        text = _text(*(cells[name] for name in names))
        score = read_score(cells[column], f"{path}, row {row}, column {column!r}")
        if text not in expected:
            strangers.append(row)
        elif text in scores and scores[text][0] != score:
            other = "" if names == ("key",) else ", or tell rollouts of one text apart by a column 'key'"
            raise ValueError(
                f"{path}, rows {scores[text][1]} and {row} give one text different scores: keep one of them{other}."
            )
        scores.setdefault(text, (score, row))
    if strangers:
        raise ValueError(
            f"{path}: {len(strangers)} rows match none of the {len(rollouts)} rollouts by {' and '.join(names)}, "
            f"the first of them row {strangers[0]}."
        )
    return [scores[text][0] if text in scores else None for text in texts]


def _read(path: Path, column: str) -> Any:
    """The file as a table of text; refuses one without the columns for joining."""
    import pandas
    from pandas import errors

    if not path.exists():
        raise FileNotFoundError(f"No file {path}.")
    try:
        with warnings.catch_warnings():
            # pandas would drop cells beyond the last column.
            warnings.simplefilter("error", errors.ParserWarning)
            # Empty lines are kept for the numbers of rows; spreadsheets begin a file with a byte order mark.
            table = pandas.read_csv(
                path, dtype=str, keep_default_na=False, skip_blank_lines=False, index_col=False, encoding="utf-8-sig"
            )
    except (errors.ParserError, errors.ParserWarning, errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file that can be read: {error}.") from error
    columns = list(table.columns)
    if column not in columns:
        raise ValueError(f"{path} has no column {column!r}, only {columns}.")
    if "key" not in columns and not {"question", "response"} <= set(columns):
        raise ValueError(f"{path} has neither a column 'key' nor both 'question' and 'response', only {columns}.")
    return table


def _text(*texts: str) -> tuple[str, ...]:
    """Texts in the form in which they are compared: spreadsheets change line ends and trim cells."""
    return tuple("\n".join(text.splitlines()).strip() for text in texts)


def read_score(text: str, place: str, *, missing: Collection[str] = ("",)) -> float | None:
    """The score, 0 to 100, in a cell of a table; None where the cell holds one of the words for a missing one.

    Raises ValueError, naming the place, for anything else.
    """
    if text.strip().lower() in missing:
        return None
    try:
        value = on_scale(float(text))
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise ValueError(f"{place}: expected a score from 0 to 100 or nothing, got {text!r}.")
    return value


ScoreName = Literal["trait_score", "coherence"]


class ScorePair(NamedTuple):
    """A rollout with both scores, 0 to 100; None for a missing one."""

    rollout: Rollout
    first: float | None
    second: float | None


@dataclass(frozen=True)
class Agreement:
    """How far two columns of scores of the same rollouts agree.

    Limits: over positive and negative rollouts together, a correlation is high as soon as both judges separate the
    sides; to see how they order the answers of one side, compare only its rollouts. Drawn by `plots.agreement`.

    Attributes:
        names: The names of the two judges.
        of: The score that was compared.
        threshold: A score of at least this shows the trait (of coherence: is coherent).
        pearson: Pearson's correlation of the scores.
        spearman: Spearman's rank correlation.
        kappa: Cohen's kappa at the threshold: agreement beyond chance. None where both put all rows on the same side.
        agreeing: The share of rows, 0 to 1, that are on the same side of the threshold for both.
        pairs: All rows, in the order of the first, including those that lack a score.
        seed: Seed of the bootstrap.
    """

    names: tuple[str, str]
    of: ScoreName
    threshold: float
    pearson: Estimate
    spearman: Estimate
    kappa: Estimate
    agreeing: Estimate
    pairs: tuple[ScorePair, ...] = field(repr=False)
    seed: int = 0

    @cached_property
    def compared(self) -> tuple[ScorePair, ...]:
        """The rows that have both scores."""
        return tuple(pair for pair in self.pairs if pair.first is not None and pair.second is not None)

    @property
    def n(self) -> int:
        """How many rows have both scores."""
        return len(self.compared)

    @property
    def missing(self) -> dict[str, int]:
        """How many rows lack a score only by the `first`, only by the `second`, or by `both`."""
        absent = Counter((pair.first is None, pair.second is None) for pair in self.pairs)
        return {"first": absent[True, False], "second": absent[False, True], "both": absent[True, True]}

    @property
    def quarters(self) -> dict[tuple[bool, bool], int]:
        """How many compared rows score at least the threshold by (the first, the second)."""
        counts = Counter(
            (pair.first >= self.threshold, pair.second >= self.threshold)
            for pair in self.pairs
            if pair.first is not None and pair.second is not None
        )
        return {(one, other): counts[one, other] for one in (True, False) for other in (True, False)}

    @property
    def traits(self) -> list[str]:
        """The traits of the rollouts, each once."""
        return list(dict.fromkeys(pair.rollout.trait for pair in self.pairs))

    @property
    def n_questions(self) -> int:
        """The number of questions of the compared rows."""
        return len({pair.rollout.question for pair in self.compared})

    @property
    def statistics_in_words(self) -> str:
        """The correlations and kappa, each with its interval."""
        estimates = {"Pearson": self.pearson, "Spearman": self.spearman, "kappa": self.kappa}
        words = ", ".join(f"{name} {_decimals(estimate)}" for name, estimate in estimates.items())
        return f"{words} at threshold {self.threshold:g}"

    @property
    def missing_in_words(self) -> str:
        """The numbers of missing scores, in words."""
        by = dict(zip((*self.names, "both"), self.missing.values(), strict=True))
        absent = ", ".join(f"{count} by {name}" + " only" * (name != "both") for name, count in by.items() if count)
        return f"without a score: {absent}" if absent else "every row has both scores"

    def table(self) -> "pandas.DataFrame":
        """A row for every rollout, farthest apart first, those without both scores last.

        `first` and `second` are the scores, `difference` is second - first.
        """
        import pandas

        columns = ["key", "polarity", "question", "response", "first", "second"]
        rows = [
            (pair.rollout.key, pair.rollout.polarity, pair.rollout.question, pair.rollout.response, *pair[1:])
            for pair in self.pairs
        ]
        table = pandas.DataFrame(rows, columns=pandas.Index(columns)).astype({"first": float, "second": float})
        table["difference"] = table["second"] - table["first"]
        return table.sort_values("difference", key=lambda column: -column.abs(), kind="stable", ignore_index=True)

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON; what is undefined is None."""
        return {
            "summary": str(self),
            "names": list(self.names),
            "of": self.of,
            "traits": self.traits,
            "threshold": self.threshold,
            "rows": len(self.pairs),
            "compared": self.n,
            "questions": self.n_questions,
            "missing": self.missing,
            "at_or_above_threshold": dict(
                zip(("both", "first", "second", "neither"), self.quarters.values(), strict=True)
            ),
            **{name: getattr(self, name)._asdict() for name in AgreementStatistics._fields},
            "seed": self.seed,
        }

    def __str__(self) -> str:
        first, second = self.names
        what = f"{self.of.replace('_', ' ')} of {', '.join(self.traits)}"
        return (
            f"{first} and {second} on the {what}, {self.n} rows of {self.n_questions} questions: "
            f"{self.statistics_in_words}. They agree there on a share of {_decimals(self.agreeing)} of these rows; "
            f"{self.missing_in_words}."
        )


def _decimals(estimate: Estimate) -> str:
    if estimate.value is None:
        return "undefined"
    numbers = [f"{number + 0.0:.2f}" for number in estimate[:3] if number is not None]
    return numbers[0] + (f" [{numbers[1]}, {numbers[2]}]" if len(numbers) == 3 else "")


def judge_agreement(
    first: Sequence[ScoredRollout],
    second: Sequence[ScoredRollout] | Sequence[float | None],
    *,
    names: tuple[str, str] = ("first", "second"),
    of: ScoreName = "trait_score",
    threshold: float = 50.0,
    seed: int = 0,
) -> Agreement:
    """Compare two judges of the same rollouts, or a judge with a column of scores by people.

    The second's scored rollouts may be in any order; a column is in the order of the first's rows, 0 to 100 and None
    for a missing score (see `read_human_scores`).

    Raises:
        ValueError: There is no row, the rows are not the same ones, or a score or the threshold is not from 0 to 100.
    """
    if not first:
        raise ValueError("There are no rows to compare.")
    if not 0 <= threshold <= 100:
        raise ValueError(f"The threshold is a score from 0 to 100, got {threshold}.")
    if names[0] == names[1]:
        raise ValueError(f"The two need names that tell them apart, got {names[0]!r} twice.")
    others = [row for row in second if isinstance(row, ScoredRollout)]
    if others and len(others) < len(second):
        raise ValueError(f"Expected scored rollouts or numbers, got {len(others)} scored rollouts among {len(second)}.")
    scores = _by_rows(first, others, of) if others else _by_column(first, cast(Sequence[float | None], second))
    pairs = tuple(ScorePair(row.rollout, getattr(row, of), score) for row, score in zip(first, scores, strict=True))
    both = [pair for pair in pairs if pair.first is not None and pair.second is not None]
    _, questions = np.unique([pair.rollout.question for pair in both], return_inverse=True)
    one, other = (np.array([pair[side] for pair in both], dtype=float) for side in (1, 2))
    statistics = agreement_statistics(one, other, questions, threshold=threshold, seed=seed)
    return Agreement(names, of, threshold, *statistics, pairs=pairs, seed=seed)


def _by_rows(first: Sequence[ScoredRollout], second: Sequence[ScoredRollout], of: ScoreName) -> list[float | None]:
    """The second's scores in the first's order; refuses rows that are not the same."""
    for side, rows in (("first", first), ("second", second)):
        if repeated := [key for key, count in Counter(row.rollout.key for row in rows).items() if count > 1]:
            raise ValueError(
                f"Rows are matched by their keys: {len(repeated)} keys repeat in the {side}, such as {repeated[0]!r}."
            )
    by_key = {row.rollout.key: row for row in second}
    shared = [row for row in first if row.rollout.key in by_key]
    if len(shared) < max(len(first), len(second)):
        raise ValueError(
            f"These are not the same rows: {len(shared)} are in both, {len(first) - len(shared)} only in the first "
            f"and {len(second) - len(shared)} only in the second. Let both judges score the same rollouts."
        )
    other_text = [row for row in first if row.rollout.response != by_key[row.rollout.key].rollout.response]
    if other_text:
        raise ValueError(
            f"These are not the same rows: {len(other_text)} of {len(first)} keys have another response in the second, "
            f"such as {other_text[0].rollout.key!r}. Let both judges score the same rollouts."
        )
    return [getattr(by_key[row.rollout.key], of) for row in first]


def _by_column(first: Sequence[ScoredRollout], column: Sequence[float | None]) -> list[float | None]:
    """The column, checked."""
    if len(column) != len(first):
        raise ValueError(
            f"A column has a score for every row, in their order: {len(first)} rows, {len(column)} scores."
        )
    for row, score in enumerate(column, start=1):
        is_number = isinstance(score, Real) and not isinstance(score, bool)
        if score is not None and not (is_number and 0 <= on_scale(float(score)) <= 100):
            raise ValueError(f"Score {row} of the column: expected 0 to 100, or None for a missing one, got {score!r}.")
    return [None if score is None else on_scale(float(score)) for score in column]
