"""Trait score against dose for one direction, beside random directions of equal norm.

The slope is the least-squares slope of the mean trait score on the coefficient, over the doses at which the model stays
coherent; its interval resamples questions. Use other questions than those that the layer was chosen on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from persona_lens.evaluation.evaluate import Evaluation, evaluate_cells, read_cells
from persona_lens.interventions.positions import NamedPositions
from persona_lens.interventions.values import Steer
from persona_lens.judges.scores import Judge, ScoredRollout, scorable_questions, score_rollouts
from persona_lens.models.structure import Model
from persona_lens.rollouts.collection import keeps_date
from persona_lens.rollouts.engines import Cell, CellEngine, ModelEngine
from persona_lens.statistics import Estimate, slopes, spearman
from persona_lens.storage.files import checked, read_result, refuse_other_json, write_json
from persona_lens.storage.locks import writes_output
from persona_lens.traits.trait import Trait, load_trait
from persona_lens.vectors.persona_vector import PersonaVector

if TYPE_CHECKING:
    import pandas

FORMAT_VERSION = 1
DOSE_FILE, ROWS_NAME = "dose_response.json", "dose"


@dataclass(frozen=True)
class DoseResponse:
    """A direction, and random ones of its norm, at the same coefficients. Drawn by `pl.plots.dose_response`.

    Attributes:
        trait: Name of the judged trait.
        layer: Where the direction acts, counted from 0.
        judge: Name of the judge.
        coefficients: Ascending, with 0.
        doses: Coefficient times |v| over the stored residual norm; None where that is unknown.
        evaluations: Of the direction, in the order of `coefficients`.
        random: Of each random direction, in the same order; at coefficient 0 they are all the same answers.
    """

    trait: str
    layer: int
    judge: str
    coefficients: tuple[float, ...]
    doses: tuple[float | None, ...]
    evaluations: tuple[Evaluation, ...] = field(repr=False)
    random: tuple[tuple[Evaluation, ...], ...] = field(default=(), repr=False)

    def slope(self, min_coherence: float = 50.0) -> Estimate:
        """Trait score gained per 1.0 of the coefficient, over doses whose mean coherence is at least `min_coherence`.

        None where fewer than two doses are left.
        """
        return self._slope(self.evaluations, min_coherence)

    def random_slopes(self, min_coherence: float = 50.0) -> list[Estimate]:
        """The same for each random direction."""
        return [self._slope(cells, min_coherence) for cells in self.random]

    def spearman(self, min_coherence: float = 50.0) -> float | None:
        """Rank correlation of coefficient and mean trait score over the coherent doses; None below three of them."""
        doses = _coherent(self.evaluations, min_coherence)
        scores = np.array([self.evaluations[index].trait_score.value for index in doses], dtype=float)
        return spearman(np.array(self.coefficients)[doses], scores)

    def _slope(self, cells: Sequence[Evaluation], min_coherence: float) -> Estimate:
        doses = _coherent(cells, min_coherence)
        n = sum(cells[index].trait_score.n for index in doses)
        if len(doses) < 2:
            return Estimate(None, None, None, n)
        x = np.array(self.coefficients)[doses]
        means = np.array([[cells[index].trait_score.value for index in doses]], dtype=float)
        resamples = np.stack([cells[index].trait_score_resamples for index in doses], axis=1)
        return Estimate.of(float(slopes(x, means)[0]), slopes(x, resamples), n)

    def rejudged(self, trait: Trait | str, *, judge: Judge, progress: bool = True) -> "DoseResponse":
        """The same answers with trait scores by another judge; the coherence stays the first judge's.

        One judge then says at which doses the model is coherent, and an independent one whether it shows the trait.
        """
        trait = load_trait(trait) if isinstance(trait, str) else trait
        series = [self.evaluations, *self.random]
        rollouts = {row.rollout.key: row.rollout for cells in series for cell in cells for row in cell.scored}
        scored = score_rollouts(list(rollouts.values()), trait, judge=judge, progress=progress)
        scores = {row.rollout.key: row.trait_score for row in scored}

        def again(cell: Evaluation) -> Evaluation:
            rows = [ScoredRollout(row.rollout, scores[row.rollout.key], row.coherence) for row in cell.scored]
            return replace(cell, scored=tuple(rows))

        own, *random = [tuple(map(again, cells)) for cells in series]
        return replace(self, judge=judge.name(trait), evaluations=own, random=tuple(random))

    def table(self) -> "pandas.DataFrame":
        """A row for every coefficient: trait score and coherence with intervals, diversity, and the random directions.

        `random_mean`, `random_low` and `random_high` are the mean, the lowest and the highest trait score of random
        directions.
        """
        import pandas

        rows = []
        for index, cell in enumerate(self.evaluations):
            scores = [cells[index].trait_score.value for cells in self.random]
            random = [score for score in scores if score is not None]
            rows.append(
                {
                    "coefficient": self.coefficients[index],
                    "dose": self.doses[index],
                    **cell.columns,
                    "random_mean": float(np.mean(random)) if random else None,
                    "random_low": min(random, default=None),
                    "random_high": max(random, default=None),
                }
            )
        return pandas.DataFrame(rows).set_index("coefficient")

    def summary(self) -> dict[str, Any]:
        """Slopes and rows as JSON; what is undefined is None."""
        return {
            "format_version": FORMAT_VERSION,
            "summary": str(self),
            "trait": self.trait,
            "layer": self.layer,
            "judge": self.judge,
            "plan": self.evaluations[0].plan,
            "coefficients": list(self.coefficients),
            "doses": list(self.doses),
            "cells": [[list(cell.interventions) for cell in cells] for cells in (self.evaluations, *self.random)],
            "slope": self.slope()._asdict(),
            "random_slopes": [slope.value for slope in self.random_slopes()],
            "spearman": self.spearman(),
            "rows": json.loads(self.table().reset_index().to_json(orient="records") or "[]"),
        }

    @classmethod
    def load(cls, folder: str | Path) -> "DoseResponse":
        """Read the result of a folder in which `dose_response` finished.

        Raises FileNotFoundError where there is none, ValueError where it is of another version or damaged.
        """
        folder = Path(folder)
        parse = partial(cls._from_record, folder)
        return read_result(folder / DOSE_FILE, FORMAT_VERSION, parse, "dose-response", "dose_response")

    @classmethod
    def _from_record(cls, folder: Path, record: Mapping[str, Any]) -> "DoseResponse":
        own, *random = [tuple(read_cells(folder, ROWS_NAME, cells, record["plan"])) for cells in record["cells"]]
        coefficients = tuple(checked(value, float) for value in record["coefficients"])
        doses = tuple(checked(value, float, NoneType) for value in record["doses"])
        if any(len(values) != len(coefficients) for values in (doses, own, *random)):
            raise ValueError(f"it has {len(coefficients)} coefficients, and other numbers of doses or cells")
        return cls(record["trait"], record["layer"], record["judge"], coefficients, doses, own, tuple(random))

    def __str__(self) -> str:
        own, rank = self.slope(), self.spearman()
        random = [slope.value for slope in self.random_slopes() if slope.value is not None]
        exceeded = own.value is not None and sum(own.value > value for value in random)
        versus = f"; it exceeds {exceeded} of {len(random)} random directions of equal norm" if random else ""
        return (
            f"{self.trait} at layer {self.layer}: {own} points for each 1.0 of the coefficient, Spearman "
            f"{'undefined' if rank is None else f'{rank:.2f}'} over coherent doses{versus} ({self.judge})"
        )


def _coherent(cells: Sequence[Evaluation], min_coherence: float) -> list[int]:
    """Indices of the cells with a trait score whose mean coherence, where the judge gave one, is high enough."""
    return [
        index
        for index, cell in enumerate(cells)
        if cell.trait_score.value is not None
        and (cell.coherence.value is None or cell.coherence.value >= min_coherence)
    ]


def random_directions(vector: PersonaVector, count: int, *, seed: int = 0) -> list[PersonaVector]:
    """Isotropic random directions at the vector's layer, each with its norm."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, vector.d_model, generator=generator, dtype=torch.float64)
    scaled = drawn * (vector.norm / torch.linalg.vector_norm(drawn, dim=1, keepdim=True))
    return [
        replace(vector, trait=f"random {index}", direction=direction.float()) for index, direction in enumerate(scaled)
    ]


@writes_output
@keeps_date
def dose_response(
    model: Model,
    vector: PersonaVector,
    trait: Trait | str,
    *,
    judge: Judge,
    coefficients: Sequence[float] = (-2.0, -1.0, 1.0, 2.0),
    random: int = 10,
    questions: Sequence[str] | None = None,
    per_question: int = 1,
    at: NamedPositions = "response",
    max_new_tokens: int = 1000,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 120,
    allow_other_model: bool = False,
    output_dir: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> DoseResponse:
    """Steer by one direction, and by `random` random ones of equal norm, at every coefficient and at 0.

    Questions default to the trait's evaluation questions, without those that the judge was calibrated on; a layer that
    was chosen on extraction questions should be confirmed on these. `output_dir` keeps dose_rollouts.jsonl,
    dose_scores.jsonl and dose_response.json; a second call continues where the first stopped.

    Raises ValueError where no question is left or the vector does not belong to the model.
    Source: arXiv:2507.21509, section 3.2.
    """
    trait = load_trait(trait) if isinstance(trait, str) else trait
    questions = scorable_questions(judge, trait, trait.evaluation_questions if questions is None else questions)
    amounts = sorted({0.0, *map(float, coefficients)})
    directions = [vector, *random_directions(vector, random, seed=seed)]
    cells = {
        cell.name: cell
        for cell in (Cell(direction, amount) for direction in directions for amount in amounts if amount)
    }
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        refuse_other_json(folder / DOSE_FILE, ("format_version", "trait", "slope"))
    engine = ModelEngine(model, max_new_tokens, temperature, top_p, batch_size)
    baseline, *steered = evaluate_cells(
        CellEngine(engine, cells, at, allow_other_model),
        trait,
        judge=judge,
        questions=questions,
        per_question=per_question,
        folder=folder,
        name=ROWS_NAME,
        seed=seed,
        progress=progress,
    )
    by_name = dict(zip(cells, steered, strict=True))
    own, *others = [
        tuple(by_name[Cell(direction, amount).name] if amount else baseline for amount in amounts)
        for direction in directions
    ]
    doses = tuple(Steer(vector, amount).doses[0] for amount in amounts)
    result = DoseResponse(trait.name, vector.layer, judge.name(trait), tuple(amounts), doses, own, tuple(others))
    if folder is not None:
        write_json(folder / DOSE_FILE, result.summary())
    return result
