"""How far two judges agree on the same answers, or a judge and people: what a cheap judge is worth.

Pearson's and Spearman's correlation of the scores, and Cohen's kappa of which answers show the trait, those that score
the threshold or more; with 95 % intervals over questions. A row that lacks a score is counted, never compared.
Knows nothing about how scores were made.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np

from persona_lens.judges.agreement_statistics import agreement_statistics
from persona_lens.judges.scores import ScoredRollout
from persona_lens.rollouts import Rollout
from persona_lens.statistics import Estimate, on_scale

if TYPE_CHECKING:
    import pandas

ScoreName = Literal["trait_score", "coherence"]


class ScorePair(NamedTuple):
    """A rollout with what each of the two made of it, 0 to 100; None for a missing score."""

    rollout: Rollout
    first: float | None
    second: float | None


@dataclass(frozen=True)
class Agreement:
    """How far two columns of scores of the same rollouts agree.

    Limits: over positive and negative rollouts together, a correlation is high as soon as both judges tell the sides
    apart; how they order the answers of one side shows if only its rollouts are compared.

    Attributes:
        names: Who gave the first and the second scores.
        of: Which score was compared.
        threshold: A score of at least this shows the trait (of coherence: is coherent).
        pearson: Pearson's correlation of the scores.
        spearman: Spearman's rank correlation.
        kappa: Cohen's kappa at the threshold: agreement beyond chance. None where both put all rows on the same side.
        agreeing: The share of rows, 0 to 1, that are on the same side of the threshold for both.
        pairs: All rows, in the order of the first, those that lack a score with them.
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
    def missing_first(self) -> int:
        """Rows that only the first gave no score."""
        return sum(pair.first is None and pair.second is not None for pair in self.pairs)

    @property
    def missing_second(self) -> int:
        """Rows that only the second gave no score."""
        return sum(pair.first is not None and pair.second is None for pair in self.pairs)

    @property
    def missing_both(self) -> int:
        """Rows that neither gave a score."""
        return sum(pair.first is None and pair.second is None for pair in self.pairs)

    @property
    def quarters(self) -> dict[tuple[bool, bool], int]:
        """How many compared rows score the threshold or more by (the first, the second)."""
        found = Counter(
            (pair.first >= self.threshold, pair.second >= self.threshold)
            for pair in self.pairs
            if pair.first is not None and pair.second is not None
        )
        return {(one, other): found[one, other] for one in (True, False) for other in (True, False)}

    @property
    def traits(self) -> list[str]:
        """The traits of the rollouts, each once."""
        return list(dict.fromkeys(pair.rollout.trait for pair in self.pairs))

    @property
    def n_questions(self) -> int:
        """To how many questions the compared rows are answers."""
        return len({pair.rollout.question for pair in self.compared})

    @property
    def statistics_in_words(self) -> str:
        """The correlations and kappa, each with its interval."""
        found = {"Pearson": self.pearson, "Spearman": self.spearman, "kappa": self.kappa}
        words = ", ".join(f"{name} {_decimals(estimate)}" for name, estimate in found.items())
        return f"{words} at threshold {self.threshold:g}"

    @property
    def missing_in_words(self) -> str:
        """How many rows lack which score, in words."""
        first, second = self.names
        by = {first: self.missing_first, second: self.missing_second, "both": self.missing_both}
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
            "missing": {"first": self.missing_first, "second": self.missing_second, "both": self.missing_both},
            "at_or_above_threshold": dict(
                zip(("both", "first", "second", "neither"), self.quarters.values(), strict=True)
            ),
            "pearson": self.pearson._asdict(),
            "spearman": self.spearman._asdict(),
            "kappa": self.kappa._asdict(),
            "agreeing": self.agreeing._asdict(),
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
    numbers = [f"{each + 0.0:.2f}" for each in estimate[:3] if each is not None]
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
    """How far two judges of the same rollouts agree, or a judge and a column of scores by people.

    The second's scored rollouts may stand in any order; a column stands in the order of the first's rows, 0 to 100 and
    None for a missing score (see `read_human_scores`).

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
    found = agreement_statistics(one, other, questions, threshold=threshold, seed=seed)
    return Agreement(names, of, threshold, *found, pairs=pairs, seed=seed)


def _by_rows(first: Sequence[ScoredRollout], second: Sequence[ScoredRollout], of: ScoreName) -> list[float | None]:
    """The second's scores in the first's order; refused where the rows are not the same."""
    for place, rows in (("first", first), ("second", second)):
        if repeated := [key for key, count in Counter(row.rollout.key for row in rows).items() if count > 1]:
            raise ValueError(
                f"Rows are matched by their keys: {len(repeated)} keys repeat in the {place}, such as {repeated[0]!r}."
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
