"""What a direction does at each dose, against random directions of equal norm.

The slope is the least-squares one of the mean trait score on the coefficient, over the doses at which the model stays
coherent; its interval resamples questions.
Knows nothing about how the layer was chosen; its questions should be others than those.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
from persona_lens.rollouts.engines import Cell
from persona_lens.statistics import Estimate, slopes, spearman
from persona_lens.storage.files import DAMAGE, checked, refuse_other_json, write_json
from persona_lens.storage.locks import writes_output
from persona_lens.traits.trait import Trait, load_trait
from persona_lens.vectors.persona_vector import PersonaVector

if TYPE_CHECKING:
    import pandas

FORMAT_VERSION = 1
DOSE_FILE, ROWS_NAME = "dose_response.json", "dose"


@dataclass(frozen=True)
class DoseResponse:
    """A direction, and random ones of its norm, at the same coefficients.

    Attributes:
        trait: The trait that was judged.
        layer: Where the direction acts, counted from 0.
        judge: The judge's name.
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
        chosen = _coherent(self.evaluations, min_coherence)
        scores = np.array([self.evaluations[index].trait_score.value for index in chosen], dtype=float)
        return spearman(np.array(self.coefficients)[chosen], scores)

    def _slope(self, cells: Sequence[Evaluation], min_coherence: float) -> Estimate:
        chosen = _coherent(cells, min_coherence)
        n = sum(cells[index].trait_score.n for index in chosen)
        if len(chosen) < 2:
            return Estimate(None, None, None, n)
        x = np.array(self.coefficients)[chosen]
        means = np.array([[cells[index].trait_score.value for index in chosen]], dtype=float)
        resamples = np.stack([cells[index].trait_score_resamples for index in chosen], axis=1)
        return Estimate.of(float(slopes(x, means)[0]), slopes(x, resamples), n)

    def rejudged(self, judge: Judge, trait: Trait, *, progress: bool = True) -> "DoseResponse":
        """The same answers with trait scores by another judge; coherence stays the first one's.

        So one judge says at which doses the model is coherent, and a judge that shares nothing with it whether the
        trait is there.
        """
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
        for index, (coefficient, dose, found) in enumerate(
            zip(self.coefficients, self.doses, self.evaluations, strict=True)
        ):
            others = [cells[index].trait_score.value for cells in self.random]
            known = [value for value in others if value is not None]
            rows.append(
                {
                    "coefficient": coefficient,
                    "dose": dose,
                    **found.columns,
                    "random_mean": float(np.mean(known)) if known else None,
                    "random_low": min(known, default=None),
                    "random_high": max(known, default=None),
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
            "cells": [[list(found.interventions) for found in cells] for cells in (self.evaluations, *self.random)],
            "slope": self.slope()._asdict(),
            "random_slopes": [each.value for each in self.random_slopes()],
            "spearman": self.spearman(),
            "rows": json.loads(self.table().reset_index().to_json(orient="records") or "[]"),
        }

    @classmethod
    def load(cls, folder: str | Path) -> "DoseResponse":
        """The dose-response of a folder in which `dose_response` ended.

        Raises FileNotFoundError where there is none, ValueError where it is of another version or damaged.
        """
        folder = Path(folder)
        file = folder / DOSE_FILE
        if not file.exists():
            raise FileNotFoundError(f"No dose-response in {folder}: make one with `persona-lens select-layer`.")
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if record["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {record['format_version']}, this persona_lens reads {FORMAT_VERSION}")
            series = [tuple(read_cells(folder, ROWS_NAME, cells, **record["plan"])) for cells in record["cells"]]
            amounts = tuple(checked(each, float) for each in record["coefficients"])
            doses = tuple(checked(each, float, NoneType) for each in record["doses"])
            if any(len(each) != len(amounts) for each in (doses, *series)):
                raise ValueError(f"it has {len(amounts)} coefficients, and other numbers of doses or cells")
            return cls(record["trait"], record["layer"], record["judge"], amounts, doses, series[0], tuple(series[1:]))
        except DAMAGE as error:
            raise ValueError(f"{file} is not a whole dose-response ({error}): make it again.") from error

    def __str__(self) -> str:
        own, others = self.slope(), [each.value for each in self.random_slopes() if each.value is not None]
        beaten = own.value is not None and sum(own.value > other for other in others)
        versus = f"; it exceeds {beaten} of {len(others)} random directions of equal norm" if others else ""
        rank = self.spearman()
        return (
            f"{self.trait} at layer {self.layer}: {own} points for each 1.0 of the coefficient, Spearman "
            f"{'undefined' if rank is None else f'{rank:.2f}'} over coherent doses{versus} ({self.judge})"
        )


def _coherent(cells: Sequence[Evaluation], min_coherence: float) -> list[int]:
    """The doses whose mean coherence suffices, where the judge gave one, and that have a trait score."""
    return [
        index
        for index, cell in enumerate(cells)
        if cell.trait_score.value is not None
        and (cell.coherence.value is None or cell.coherence.value >= min_coherence)
    ]


def random_directions(vector: PersonaVector, count: int, *, seed: int = 0) -> list[PersonaVector]:
    """Isotropic random directions at the vector's layer, each of its norm."""
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
    output: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> DoseResponse:
    """Steer by one direction, and by `random` random ones of equal norm, at every coefficient and at 0.

    Questions default to the trait's evaluation questions that the judge was not calibrated on, which is what a layer
    chosen on extraction questions should be confirmed on. With `output`, a folder, every batch is kept there
    (dose_rollouts.jsonl, dose_scores.jsonl, dose_response.json), and a second call goes on where the first stopped.

    Raises ValueError where no question is left or the vector does not belong to the model.
    Source: arXiv:2507.21509, section 3.2.
    """
    trait = load_trait(trait) if isinstance(trait, str) else trait
    asked = scorable_questions(judge, trait, trait.evaluation_questions if questions is None else questions)
    amounts = sorted({0.0, *map(float, coefficients)})
    directions = [vector, *random_directions(vector, random, seed=seed)]
    cells = [Cell(direction, amount) for direction in directions for amount in amounts if amount]
    folder = None if output is None else Path(output)
    if folder is not None:
        refuse_other_json(folder / DOSE_FILE, ("format_version", "trait", "slope"))
    baseline, *found = evaluate_cells(
        model,
        trait,
        judge,
        cells,
        questions=asked,
        per_question=per_question,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        batch_size=batch_size,
        at=at,
        allow_other_model=allow_other_model,
        folder=folder,
        name=ROWS_NAME,
        seed=seed,
        progress=progress,
    )
    by_cell = {cell.name: evaluation for cell, evaluation in zip(cells, found, strict=True)}
    series = [
        tuple(by_cell[Cell(direction, amount).name] if amount else baseline for amount in amounts)
        for direction in directions
    ]
    doses = tuple(Steer(vector, amount).doses[0] for amount in amounts)
    result = DoseResponse(
        trait.name, vector.layer, judge.name(trait), tuple(amounts), doses, series[0], tuple(series[1:])
    )
    if folder is not None:
        write_json(folder / DOSE_FILE, result.summary())
    return result
