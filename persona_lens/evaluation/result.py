"""What a judge made of a model's answers: means with their intervals, and the rows behind them.

Knows nothing about how the answers were sampled.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from persona_lens.judges import ScoredRollout
from persona_lens.statistics import N_RESAMPLES, Estimate, mean_estimate, question_resamples, resampled_means


@dataclass(frozen=True)
class Evaluation:
    """What a judge made of a model's answers under some interventions.

    Attributes:
        trait: The trait that was judged.
        scored: The answers with their scores.
        interventions: What acted while they were sampled, in words; empty for nothing.
        at: On which tokens it acted.
        seed: Seed of the bootstrap.
    """

    trait: str
    scored: tuple[ScoredRollout, ...] = field(repr=False)
    interventions: tuple[str, ...] = ()
    at: str = "response"
    seed: int = 0

    @cached_property
    def trait_score(self) -> Estimate:
        """Mean trait score, 0 to 100, of the answers that have one; `n` says how many those are."""
        return mean_estimate([row.trait_score for row in self.scored], self._questions, seed=self.seed)

    @cached_property
    def coherence(self) -> Estimate:
        """Mean coherence, 0 to 100."""
        return mean_estimate([row.coherence for row in self.scored], self._questions, seed=self.seed)

    @cached_property
    def diversity(self) -> float | None:
        """Distinct 2-grams of words over all 2-grams, of all answers together; None where there are none.

        It falls with the number of answers, so compare evaluations of equal size; a bootstrap would count an answer
        twice and so has no meaning for it. Source: distinct-n, arXiv:1510.03055.
        """
        words = [row.rollout.response.lower().split() for row in self.scored]
        grams = [gram for answer in words for gram in pairwise(answer)]
        return len(set(grams)) / len(grams) if grams else None

    @cached_property
    def trait_score_resamples(self) -> np.ndarray:
        """The mean trait score in every bootstrap resample, the same questions being drawn in evaluations of one seed.

        So differences and slopes of evaluations over the same questions are paired. NaN for one question, which
        resampling cannot vary.
        """
        if len(self.questions) < 2:
            return np.full(N_RESAMPLES, np.nan)
        place = {question: index for index, question in enumerate(sorted(self.questions))}
        questions = np.array([place[question] for question in self._questions])
        values = np.array([np.nan if row.trait_score is None else row.trait_score for row in self.scored], dtype=float)
        return resampled_means(values, questions, question_resamples(len(place), N_RESAMPLES, self.seed))

    @property
    def missing(self) -> int:
        """Answers without a trait score: empty ones, and those that the judge refused to score."""
        return len(self.scored) - self.trait_score.n

    @property
    def questions(self) -> list[str]:
        """The questions that were answered, each once."""
        return list(dict.fromkeys(self._questions))

    @property
    def _questions(self) -> list[str]:
        return [row.rollout.question for row in self.scored]

    @property
    def plan(self) -> dict[str, Any]:
        """What tells its rows from others in one file, and how they were scored: what `read_cells` wants."""
        samples = {row.rollout.sample for row in self.scored}
        return {
            "trait": self.trait,
            "questions": self.questions,
            "per_question": max(samples, default=-1) + 1,
            "at": self.at,
            "seed": self.seed,
        }

    @property
    def columns(self) -> dict[str, float | int | None]:
        """Its numbers as a row of a table."""
        scores = {"trait_score": self.trait_score, "coherence": self.coherence}
        ends = {
            name + end: value
            for name, found in scores.items()
            for end, value in (("", found.value), ("_low", found.low), ("_high", found.high))
        }
        return {**ends, "diversity": self.diversity, "n": len(self.scored), "missing": self.missing}

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON."""
        return {
            "trait": self.trait,
            "interventions": list(self.interventions),
            "at": self.at,
            "rows": len(self.scored),
            "questions": len(self.questions),
            "missing": self.missing,
            "trait_score": self.trait_score._asdict(),
            "coherence": self.coherence._asdict(),
            "diversity": self.diversity,
        }

    def __str__(self) -> str:
        done = "; ".join(self.interventions) or "no intervention"
        diversity = "-" if self.diversity is None else f"{self.diversity:.2f}"
        return (
            f"{done}: {self.trait} {self.trait_score}, coherence {self.coherence}, diversity {diversity} "
            f"({len(self.scored)} answers, {self.missing} without a trait score)"
        )
