"""How a model behaves under interventions: trait, coherence and diversity of its answers, with intervals.

Answers are sampled with the interventions acting and judged with all of them suspended; intervals resample questions.
The dose-response of a direction, and every cell of a layer sweep, is such an evaluation.
Knows nothing about which layer or coefficient is best.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from persona_lens.interventions import Intervention, NamedPositions, Steer, intervene
from persona_lens.judges import Judge, ScoredRollout, scorable_questions, score_rollouts
from persona_lens.models import Model
from persona_lens.records import write_json
from persona_lens.rollouts import ModelEngine, Prompt, Rollout, collect_rollouts, plan_rollouts
from persona_lens.statistics import N_RESAMPLES, Estimate, mean_estimate, question_resamples, resampled_means
from persona_lens.traits import Trait, load_trait
from persona_lens.vectors import PersonaVector

RECORD_VERSION = 1


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


@dataclass
class IntervenedEngine:
    """Samples rollouts from a model under interventions that are the same for every row."""

    engine: ModelEngine
    interventions: tuple[Intervention, ...]
    at: NamedPositions = "response"
    allow_other_model: bool = False

    @property
    def batch_rows(self) -> int:
        """Rows that are decoded together."""
        return self.engine.batch_rows

    @property
    def name(self) -> str:
        """Model, sampling settings and interventions."""
        done = "; ".join(f"{each} [{each.fingerprint}]" for each in self.interventions)
        return f"{self.engine.name}; {done}, on {self.at} tokens"

    def answer(self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False) -> list[Rollout]:
        """Sample one response a prompt."""
        with intervene(self.engine.model, *self.interventions, at=self.at, allow_other_model=self.allow_other_model):
            answers = self.engine.answer(prompts, seed=seed, progress=progress)
        return [replace(answer, engine=self.name) for answer in answers]


class Cell(NamedTuple):
    """A vector with the coefficient that it steers by."""

    vector: PersonaVector
    coefficient: float

    @property
    def name(self) -> str:
        """What names the cell in files: trait, layer, the vector's fingerprint and the coefficient."""
        vector = self.vector
        return f"{vector.trait} at layer {vector.layer} [{vector.fingerprint}] x {self.coefficient:g}"


@dataclass
class CellEngine:
    """Samples rollouts whose rows are steered each in its own way, mixed in batches.

    A row is steered by the cell that its prompt's `intervention` names, an empty name being none. Rows of one question
    run its prompt once, and a row's text is the one that it has when sampled under its cell alone.
    """

    engine: ModelEngine
    cells: Mapping[str, Cell]
    at: NamedPositions = "response"
    allow_other_model: bool = False

    @property
    def batch_rows(self) -> int:
        """Rows that are decoded together."""
        return self.engine.batch_rows

    @property
    def name(self) -> str:
        """Model and sampling settings; the cell stands in each row."""
        return f"{self.engine.name}; steered on {self.at} tokens"

    def answer(self, prompts: Sequence[Prompt], *, seed: int, progress: bool = False) -> list[Rollout]:
        """Sample one response a prompt."""
        steered = [(row, self.cells[prompt.intervention]) for row, prompt in enumerate(prompts) if prompt.intervention]
        vectors = {cell.vector.fingerprint: cell.vector for _, cell in steered}
        column = {fingerprint: index for index, fingerprint in enumerate(vectors)}
        coefficients = torch.zeros(len(prompts), len(vectors))
        for row, cell in steered:
            coefficients[row, column[cell.vector.fingerprint]] = cell.coefficient
        with ExitStack() as stack:
            if vectors:
                value = Steer(list(vectors.values()), coefficients)
                context = intervene(self.engine.model, value, at=self.at, allow_other_model=self.allow_other_model)
                stack.enter_context(context)
            answers = self.engine.answer(prompts, seed=seed, progress=progress)
        return [replace(answer, engine=self.name) for answer in answers]


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
    batch_rows: int = 100,
    allow_other_model: bool = False,
    output: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Trait, coherence and diversity of the model's answers under interventions and a neutral system prompt.

    Questions default to the trait's evaluation questions that the judge was not calibrated on. With one seed, a row is
    sampled by the same random numbers under every intervention. With `output`, a folder, rollouts.jsonl, scores.jsonl,
    evaluation.json and the interventions themselves are kept there, and a second call goes on where the first stopped.

    Raises ValueError where no question is left, a vector does not belong to the model, or `output` holds another run.
    Source: arXiv:2507.21509, section 3.2.
    """
    trait = load_trait(trait) if isinstance(trait, str) else trait
    asked = scorable_questions(judge, trait, trait.evaluation_questions) if questions is None else list(questions)
    prompts = plan_rollouts(trait, polarities=["neutral"], questions=asked, per_question=per_question)
    plain = ModelEngine(model, max_new_tokens, temperature, top_p, batch_rows)
    done = tuple(interventions)
    engine = IntervenedEngine(plain, done, at, allow_other_model) if done else plain
    folder = None if output is None else Path(output)
    rollouts = collect_rollouts(
        engine, prompts, seed=seed, output=folder and folder / "rollouts.jsonl", progress=progress
    )
    scored = score_rollouts(judge, trait, rollouts, output=folder and folder / "scores.jsonl", progress=progress)
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
    batch_rows: int = 120,
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
        ModelEngine(model, max_new_tokens, temperature, top_p, batch_rows), named, at, allow_other_model
    )
    asked = plan_rollouts(trait, polarities=["neutral"], questions=questions, per_question=per_question)
    # By question, so that the rows of a batch share its prompt.
    prompts = [replace(prompt, intervention=cell) for prompt in asked for cell in ("", *named)]
    files = [folder and folder / f"{name}_{kind}.jsonl" for kind in ("rollouts", "scores")]
    rollouts = collect_rollouts(engine, prompts, seed=seed, output=files[0], progress=progress)
    scored = score_rollouts(judge, trait, rollouts, output=files[1], progress=progress)
    rows: dict[str, list[ScoredRollout]] = {cell: [] for cell in ("", *named)}
    for row in scored:
        rows[row.rollout.intervention].append(row)
    return [
        Evaluation(trait.name, tuple(rows[cell]), (cell,) if cell else (), at, seed)
        for cell in ("", *(cell.name for cell in cells))
    ]
