"""Evaluate a model under interventions: sample answers, judge them, report means with intervals.

`evaluate` measures one set of interventions. `evaluate_cells` measures many (vector, coefficient) cells at once, their
rows mixed in batched generation; layer sweeps and dose-responses are made of these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_lens.interventions.positions import NamedPositions
from persona_lens.interventions.values import Intervention
from persona_lens.judges.scores import Judge, ScoredRollout, read_scores, scorable_questions, score_rollouts
from persona_lens.models.structure import Model
from persona_lens.rollouts.collection import collect_rollouts, keeps_date, plan_rollouts
from persona_lens.rollouts.engines import CellEngine, IntervenedEngine, ModelEngine, RolloutEngine
from persona_lens.rollouts.rows import Prompt, Rollout, read_rollouts
from persona_lens.statistics import N_RESAMPLES, Estimate, mean_estimate, question_resamples, resampled_means
from persona_lens.storage.files import checked, ensure_writable, read_result, refuse_other_json, write_json
from persona_lens.storage.locks import writes_output
from persona_lens.traits.trait import Trait, load_trait

if TYPE_CHECKING:
    import pandas

FORMAT_VERSION = 1
EVALUATION_KEYS = ("format_version", "trait", "interventions", "trait_score")
"""Keys that mark an evaluation.json as ours, so that it may be replaced."""


@dataclass(frozen=True)
class Evaluation:
    """A model's judged answers under some interventions.

    Attributes:
        trait: Name of the judged trait.
        scored: The answers with their scores.
        interventions: What acted during sampling, in words; empty for nothing.
        at: The tokens on which it acted.
        seed: Seed of the bootstrap.
    """

    trait: str
    scored: tuple[ScoredRollout, ...] = field(repr=False)
    interventions: tuple[str, ...] = ()
    at: str = "response"
    seed: int = 0

    @cached_property
    def trait_score(self) -> Estimate:
        """Mean trait score, 0 to 100, over the answers that have one; `n` counts these."""
        return mean_estimate([row.trait_score for row in self.scored], self._row_questions, seed=self.seed)

    @cached_property
    def coherence(self) -> Estimate:
        """Mean coherence, 0 to 100."""
        return mean_estimate([row.coherence for row in self.scored], self._row_questions, seed=self.seed)

    @cached_property
    def diversity(self) -> float | None:
        """Distinct word 2-grams over all 2-grams, pooled over answers; None where there are none.

        It falls with the number of answers, so compare evaluations of equal size. It has no interval: a bootstrap
        repeats answers, which lowers it by itself. Source: distinct-n, arXiv:1510.03055.
        """
        answers = [row.rollout.response.lower().split() for row in self.scored]
        grams = [gram for words in answers for gram in pairwise(words)]
        return len(set(grams)) / len(grams) if grams else None

    @cached_property
    def trait_score_resamples(self) -> np.ndarray:
        """Mean trait score in every bootstrap resample; NaN with a single question, which cannot be resampled.

        Evaluations with one seed and the same questions draw the same resamples, so their differences and slopes are
        paired by question.
        """
        if len(self.questions) < 2:
            return np.full(N_RESAMPLES, np.nan)
        place = {question: index for index, question in enumerate(sorted(self.questions))}
        questions = np.array([place[question] for question in self._row_questions])
        scores = np.array([np.nan if row.trait_score is None else row.trait_score for row in self.scored], dtype=float)
        return resampled_means(scores, questions, question_resamples(len(place), N_RESAMPLES, self.seed))

    @property
    def missing(self) -> int:
        """Number of answers without a trait score: empty, or not scored by the judge."""
        return len(self.scored) - self.trait_score.n

    @property
    def questions(self) -> list[str]:
        """The distinct questions, in order."""
        return list(dict.fromkeys(self._row_questions))

    @property
    def _row_questions(self) -> list[str]:
        return [row.rollout.question for row in self.scored]

    @property
    def plan(self) -> dict[str, Any]:
        """What identifies its rows in a file that holds other rows too."""
        return {
            "trait": self.trait,
            "questions": self.questions,
            "per_question": max((row.rollout.sample for row in self.scored), default=-1) + 1,
            "at": self.at,
            "seed": self.seed,
        }

    @property
    def columns(self) -> dict[str, float | int | None]:
        """The numbers as one row of a table of evaluations."""
        intervals = {
            f"{name}{end}": value
            for name, mean in (("trait_score", self.trait_score), ("coherence", self.coherence))
            for end, value in (("", mean.value), ("_low", mean.low), ("_high", mean.high))
        }
        return {**intervals, "diversity": self.diversity, "n": len(self.scored), "missing": self.missing}

    def table(self) -> "pandas.DataFrame":
        """A row for each answer: `question`, `sample`, `response`, `trait_score`, `coherence`."""
        import pandas

        columns = ["question", "sample", "response", "trait_score", "coherence"]
        rows = [
            (row.rollout.question, row.rollout.sample, row.rollout.response, row.trait_score, row.coherence)
            for row in self.scored
        ]
        return pandas.DataFrame(rows, columns=columns).astype({"trait_score": float, "coherence": float})

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

    @classmethod
    def load(cls, folder: str | Path) -> "Evaluation":
        """Read what `evaluate` left in its `output_dir`.

        Raises FileNotFoundError where there is none, ValueError where it is damaged or of another version.
        """
        folder = Path(folder)
        parse = partial(cls._from_record, folder)
        return read_result(folder / "evaluation.json", FORMAT_VERSION, parse, "evaluation", "evaluate")

    @classmethod
    def _from_record(cls, folder: Path, record: Mapping[str, Any]) -> "Evaluation":
        rows = [
            row
            for row in read_rollouts(folder / "rollouts.jsonl")
            if (row.trait, row.polarity, row.intervention, row.condition) == (record["trait"], "neutral", "", "")
        ]
        # Files of 0.1.0 have no plan: every neutral row of theirs belongs to the evaluation.
        if plan := record.get("plan"):
            order = {question: index for index, question in enumerate(plan["questions"])}
            rows = [row for row in rows if row.question in order and row.sample < plan["per_question"]]
            rows.sort(key=lambda row: (order[row.question], row.sample))
        if len(rows) != record["rows"]:
            raise ValueError(f"its rollouts.jsonl has {len(rows)} of {record['rows']} rows")
        scored = read_scores(folder / "scores.jsonl", rows)
        seed = plan["seed"] if plan else rows[0].seed
        return cls(record["trait"], tuple(scored), tuple(record["interventions"]), record["at"], seed)

    def __str__(self) -> str:
        diversity = "-" if self.diversity is None else f"{self.diversity:.2f}"
        return (
            f"{'; '.join(self.interventions) or 'no intervention'}: {self.trait} {self.trait_score}, coherence "
            f"{self.coherence}, diversity {diversity} ({len(self.scored)} answers, {self.missing} without a score)"
        )


@writes_output
@keeps_date
def evaluate(
    model: Model,
    trait: Trait | str,
    *,
    judge: Judge,
    interventions: Sequence[Intervention] = (),
    at: NamedPositions = "response",
    questions: Sequence[str] | None = None,
    per_question: int = 1,
    max_new_tokens: int = 1000,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 100,
    allow_other_model: bool = False,
    output_dir: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Trait score, coherence and diversity of the model's answers, under interventions and a neutral system prompt.

    Questions default to the trait's evaluation questions, without those that the judge was calibrated on. With one
    seed, a row draws the same random numbers under every intervention. `output_dir` keeps rollouts.jsonl, scores.jsonl
    and evaluation.json (with the interventions themselves); a second call continues where the first stopped.

    Raises ValueError where no question is left, a vector does not belong to the model, or `output_dir` holds another
    run or another evaluation.json. Source: arXiv:2507.21509, section 3.2.
    """
    trait = load_trait(trait) if isinstance(trait, str) else trait
    interventions = tuple(interventions)
    if questions is None:
        questions = scorable_questions(judge, trait, trait.evaluation_questions)
    prompts = plan_rollouts(trait, polarities=["neutral"], questions=questions, per_question=per_question)
    engine: RolloutEngine = ModelEngine(model, max_new_tokens, temperature, top_p, batch_size)
    if interventions:
        engine = IntervenedEngine(engine, interventions, at, allow_other_model)
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        refuse_other_json(folder / "evaluation.json", EVALUATION_KEYS)
    scored = _answer_and_judge(engine, prompts, trait, judge, folder, "", seed, progress)
    evaluation = Evaluation(trait.name, tuple(scored), tuple(map(str, interventions)), at, seed)
    if folder is not None:
        record = {
            "format_version": FORMAT_VERSION,
            **evaluation.summary(),
            "judge": judge.name(trait),
            "engine": engine.name,
            "done": [intervention.to_dict() for intervention in interventions],
            "plan": evaluation.plan,
        }
        write_json(folder / "evaluation.json", record)
    return evaluation


def evaluate_cells(
    engine: CellEngine,
    trait: Trait,
    *,
    judge: Judge,
    questions: Sequence[str],
    per_question: int = 1,
    folder: Path | None = None,
    name: str = "cells",
    seed: int = 0,
    progress: bool = True,
) -> list[Evaluation]:
    """The evaluation without steering, followed by one for each of the engine's cells.

    The rows of all cells are mixed in batched generation. Each cell equals `evaluate` under its `Steer` alone, up to
    rounding by another batch shape. In `folder`, {name}_rollouts.jsonl and {name}_scores.jsonl make it resumable.
    """
    cells = ["", *engine.cells]
    neutral = plan_rollouts(trait, polarities=["neutral"], questions=questions, per_question=per_question)
    # The cells of one prompt follow each other, so that a batch runs the prompt once.
    prompts = [replace(prompt, intervention=cell) for prompt in neutral for cell in cells]
    scored = _answer_and_judge(engine, prompts, trait, judge, folder, f"{name}_", seed, progress)
    return _by_cell(scored, [(cell,) if cell else () for cell in cells], trait.name, engine.at, seed)


def _answer_and_judge(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    trait: Trait,
    judge: Judge,
    folder: Path | None,
    prefix: str,
    seed: int,
    progress: bool,
) -> list[ScoredRollout]:
    """Sample and score the prompts, in {prefix}rollouts.jsonl and {prefix}scores.jsonl of the folder."""
    rollouts_file, scores_file = (folder and folder / f"{prefix}{kind}.jsonl" for kind in ("rollouts", "scores"))
    if scores_file is not None:
        ensure_writable(scores_file)  # before hours of sampling
    rollouts = collect_rollouts(engine, prompts, seed=seed, output_file=rollouts_file, progress=progress)
    return score_rollouts(rollouts, trait, judge=judge, output_file=scores_file, progress=progress)


def _by_cell(
    scored: Sequence[ScoredRollout], cells: Sequence[tuple[str, ...]], trait: str, at: str, seed: int
) -> list[Evaluation]:
    """The evaluation of each cell, given as its `Evaluation.interventions`: empty, or the cell's name."""
    rows: dict[tuple[str, ...], list[ScoredRollout]] = {cell: [] for cell in cells}
    for row in scored:
        rows[(row.rollout.intervention,) if row.rollout.intervention else ()].append(row)
    return [Evaluation(trait, tuple(rows[cell]), cell, at, seed) for cell in cells]


def read_cells(folder: Path, name: str, cells: Sequence[Sequence[str]], plan: Mapping[str, Any]) -> list[Evaluation]:
    """The evaluations that `evaluate_cells` left in a folder, for each of `cells` (their `Evaluation.interventions`).

    `plan` is an `Evaluation.plan`; the folder may hold more cells, questions and samples than it names. Raises
    FileNotFoundError where a file is missing, ValueError where a cell has no rows.
    """
    seed = checked(plan["seed"], int, low=0)
    keys = [tuple(cell) for cell in cells]
    questions, names = set(plan["questions"]), {"".join(key) for key in keys}

    def is_planned(row: Rollout) -> bool:
        return row.intervention in names and row.question in questions and row.sample < plan["per_question"]

    rollouts_file = folder / f"{name}_rollouts.jsonl"
    rollouts = [row for row in read_rollouts(rollouts_file) if row.trait == plan["trait"] and is_planned(row)]
    if empty := names - {row.intervention for row in rollouts}:
        raise ValueError(f"{rollouts_file} has no rows of {min(empty)!r}")
    return _by_cell(read_scores(folder / f"{name}_scores.jsonl", rollouts), keys, plan["trait"], plan["at"], seed)
