"""What a judge made of a model's answers: means with their intervals, and the rows behind them.

Knows nothing about how the answers were sampled.

Evaluations made: of one set of interventions, or of many cells whose rows are mixed in batched generation.

Knows nothing about which cells are worth comparing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from persona_lens.interventions.intervention import Intervention
from persona_lens.interventions.positions import NamedPositions
from persona_lens.judges.scores import Judge, ScoredRollout, read_scores, scorable_questions, score_rollouts
from persona_lens.models.structure import Model
from persona_lens.rollouts.collection import collect_rollouts, keeps_date, plan_rollouts
from persona_lens.rollouts.engines import Cell, CellEngine, IntervenedEngine, ModelEngine
from persona_lens.rollouts.rows import read_rollouts
from persona_lens.statistics import N_RESAMPLES, Estimate, mean_estimate, question_resamples, resampled_means
from persona_lens.storage.files import checked, ensure_writable, refuse_other_json, write_json
from persona_lens.storage.locks import writes_output
from persona_lens.traits.trait import Trait, load_trait


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


RECORD_VERSION = 1
RECORD_KEYS = ("format_version", "trait", "interventions", "trait_score")
"""By which evaluation.json is known to be ours."""


@writes_output
@keeps_date
def evaluate(
    model: Model,
    trait: Trait | str,
    judge: Judge,
    *,
    interventions: Sequence[Intervention] = (),
    at: NamedPositions = "response",
    questions: Sequence[str] | None = None,
    per_question: int = 1,
    max_new_tokens: int = 1000,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 100,
    allow_other_model: bool = False,
    output: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Trait, coherence and diversity of the model's answers under interventions and a neutral system prompt.

    Questions default to the trait's evaluation questions that the judge was not calibrated on. With one seed, a row is
    sampled by the same random numbers under every intervention. With `output`, a folder, rollouts.jsonl, scores.jsonl,
    evaluation.json and the interventions themselves are kept there, and a second call goes on where the first stopped.

    Raises ValueError where no question is left, a vector does not belong to the model, or `output` holds another run or
    an evaluation.json of something else.
    Source: arXiv:2507.21509, section 3.2.
    """
    trait = load_trait(trait) if isinstance(trait, str) else trait
    asked = scorable_questions(judge, trait, trait.evaluation_questions) if questions is None else list(questions)
    prompts = plan_rollouts(trait, polarities=["neutral"], questions=asked, per_question=per_question)
    plain = ModelEngine(model, max_new_tokens, temperature, top_p, batch_size)
    done = tuple(interventions)
    engine = IntervenedEngine(plain, done, at, allow_other_model) if done else plain
    folder = None if output is None else Path(output)
    if folder is not None:
        ensure_writable(folder / "scores.jsonl")
        refuse_other_json(folder / "evaluation.json", RECORD_KEYS)
    rollouts = collect_rollouts(
        engine, prompts, seed=seed, output_file=folder and folder / "rollouts.jsonl", progress=progress
    )
    scored = score_rollouts(
        rollouts, trait, judge=judge, output_file=folder and folder / "scores.jsonl", progress=progress
    )
    words = tuple(str(each) for each in done)
    found = Evaluation(trait.name, tuple(scored), words, at, seed)
    if folder is not None:
        record = {
            "format_version": RECORD_VERSION,
            **found.summary(),
            "judge": judge.name(trait),
            "engine": engine.name,
            "done": [each.to_dict() for each in done],
        }
        write_json(folder / "evaluation.json", record)
    return found


def evaluate_cells(
    model: Model,
    trait: Trait,
    judge: Judge,
    cells: Sequence[Cell],
    *,
    questions: Sequence[str],
    per_question: int = 1,
    max_new_tokens: int = 1000,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 120,
    at: NamedPositions = "response",
    allow_other_model: bool = False,
    folder: Path | None = None,
    name: str = "cells",
    seed: int = 0,
    progress: bool = True,
) -> list[Evaluation]:
    """An `Evaluation` without steering, and then one under each cell.

    The rows of all cells are mixed in batched generation; each cell equals `evaluate` under its `Steer` alone, up to
    the rounding of another batch shape. In `folder`, {name}_rollouts.jsonl and {name}_scores.jsonl make it resumable.
    """
    named = {cell.name: cell for cell in cells}
    engine = CellEngine(
        ModelEngine(model, max_new_tokens, temperature, top_p, batch_size), named, at, allow_other_model
    )
    asked = plan_rollouts(trait, polarities=["neutral"], questions=questions, per_question=per_question)
    # By question, so that the rows of a batch share its prompt.
    prompts = [replace(prompt, intervention=cell) for prompt in asked for cell in ("", *named)]
    files = [folder and folder / f"{name}_{kind}.jsonl" for kind in ("rollouts", "scores")]
    if files[1] is not None:
        ensure_writable(files[1])
    rollouts = collect_rollouts(engine, prompts, seed=seed, output_file=files[0], progress=progress)
    scored = score_rollouts(rollouts, trait, judge=judge, output_file=files[1], progress=progress)
    rows: dict[str, list[ScoredRollout]] = {cell: [] for cell in ("", *named)}
    for row in scored:
        rows[row.rollout.intervention].append(row)
    return [
        Evaluation(trait.name, tuple(rows[cell]), (cell,) if cell else (), at, seed)
        for cell in ("", *(cell.name for cell in cells))
    ]


def read_cells(
    folder: Path,
    name: str,
    cells: Sequence[Sequence[str]],
    *,
    trait: str,
    questions: Sequence[str],
    per_question: int,
    at: str,
    seed: int,
) -> list[Evaluation]:
    """The evaluations that `evaluate_cells` made in a folder, for each of the given `Evaluation.interventions`.

    The rest are the parts of `Evaluation.plan`: the folder may hold more questions or samples than these. Raises
    FileNotFoundError where a file is missing, ValueError where a cell has no rows.
    """
    checked(seed, int, low=0)
    wanted, asked = {cell[0] if cell else "" for cell in cells}, set(questions)
    rollouts = [
        row
        for row in read_rollouts(folder / f"{name}_rollouts.jsonl")
        if row.trait == trait and row.intervention in wanted and row.question in asked and row.sample < per_question
    ]
    rows: dict[str, list[ScoredRollout]] = {cell: [] for cell in wanted}
    for row in read_scores(folder / f"{name}_scores.jsonl", rollouts):
        rows[row.rollout.intervention].append(row)
    if empty := [cell for cell in wanted if not rows[cell]]:
        raise ValueError(f"{folder / name}_rollouts.jsonl has no rows of {empty[0]!r}")
    return [Evaluation(trait, tuple(rows[cell[0] if cell else ""]), tuple(cell), at, seed) for cell in cells]
