"""The result of a layer sweep: an evaluation for every layer and coefficient, the best of them, and why.

Knows nothing about how answers were sampled or judged.

`select_layer`: every layer steered at the same coefficients, all of it mixed in batched generation, then judged.

Knows nothing about how the best cell is chosen from the result.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from persona_lens.evaluation.evaluate import Evaluation, evaluate_cells, read_cells
from persona_lens.evaluation.layer_proxies import FixedTexts, fixed_texts, screen_layers
from persona_lens.interventions.positions import NamedPositions
from persona_lens.interventions.values import Steer
from persona_lens.judges.scores import Judge, scorable_questions
from persona_lens.models.structure import Model
from persona_lens.rollouts.collection import keeps_date
from persona_lens.rollouts.engines import Cell
from persona_lens.statistics import N_RESAMPLES, Estimate, spearman
from persona_lens.storage.files import DAMAGE, refuse_other_json, write_json
from persona_lens.storage.locks import writes_output
from persona_lens.traits.trait import Trait, load_trait
from persona_lens.vectors.persona_vectors import PersonaVectors

if TYPE_CHECKING:
    import pandas

FORMAT_VERSION = 1
SWEEP_FILE, ROWS_NAME = "layer_sweep.json", "sweep"
RANK_RESAMPLES = 500


@dataclass(frozen=True)
class LayerChoice:
    """The layer and coefficient that a sweep recommends.

    Attributes:
        layer: Counted from 0.
        coefficient: The one with the highest trait score at that layer.
        dose: Coefficient times the direction's norm over the stored residual norm; None where that is unknown.
        trait_score: Of that cell.
        coherence: Of that cell.
        ties: Other cells (layer, coefficient) whose trait score the questions do not tell apart from the best.
        reason: Why, in one sentence.
    """

    layer: int
    coefficient: float
    dose: float | None
    trait_score: Estimate
    coherence: Estimate
    ties: tuple[tuple[int, float], ...]
    reason: str


@dataclass(frozen=True)
class LayerSweep:
    """Every layer steered at the same coefficients.

    Attributes:
        trait: The trait that was judged.
        judge: The judge's name.
        layers: Ascending, counted from 0.
        coefficients: As steered.
        baseline: Without steering.
        evaluations: By (layer, coefficient).
        doses: Coefficient times |v| over the stored residual norm, by (layer, coefficient); None where unknown.
        screens: Cheap measures of each layer, in the order of `layers`; see `SCREENS`.
    """

    trait: str
    judge: str
    layers: tuple[int, ...]
    coefficients: tuple[float, ...]
    baseline: Evaluation
    evaluations: Mapping[tuple[int, float], Evaluation] = field(repr=False)
    doses: Mapping[tuple[int, float], float | None] = field(repr=False)
    screens: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict, repr=False)

    def best(self, min_coherence: float | None = 75.0) -> LayerChoice:
        """The cell with the highest mean trait score among those whose mean coherence is at least `min_coherence`.

        With None, coherence does not count: for a judge that gives none, and for the paper's own rule.

        Ties are the cells whose difference from it has a 95 % interval, paired over questions, that holds 0. Being the
        best of many, its score is optimistic: confirm it on other questions with `dose_response`.
        Raises ValueError where no cell is coherent enough. Source: arXiv:2507.21509, section B.4, and coherence.
        """
        scores = {cell: found.trait_score.value for cell, found in self.evaluations.items()}
        coherence = {cell: found.coherence.value for cell, found in self.evaluations.items()}
        eligible = {
            cell: score
            for cell, score in scores.items()
            if score is not None
            and (min_coherence is None or ((found := coherence[cell]) is not None and found >= min_coherence))
        }
        if not eligible:
            raise ValueError(self._why_none(coherence, min_coherence))
        top = max(eligible, key=eligible.__getitem__)
        ties = tuple(cell for cell in eligible if cell != top and self._tells_nothing(top, cell))
        layer, coefficient = top
        found = self.evaluations[top]
        tied = f"; {len(ties)} others are not told apart from it" * bool(ties)
        return LayerChoice(
            layer,
            coefficient,
            self.doses[top],
            found.trait_score,
            found.coherence,
            ties,
            f"layer {layer} at {coefficient:g} has the highest {self.trait} score, {found.trait_score} against "
            f"{self.baseline.trait_score} unsteered, of the {len(eligible)} of {len(scores)} cells with a "
            + ("trait score" if min_coherence is None else f"mean coherence of {min_coherence:g} or more")
            + tied,
        )

    def _why_none(self, coherence: Mapping[tuple[int, float], float | None], min_coherence: float | None) -> str:
        measured = {cell: value for cell, value in coherence.items() if value is not None}
        if min_coherence is None:
            return f"{self.trait}: the judge gave none of {len(coherence)} cells a trait score: use another judge."
        if not measured:
            return (
                f"{self.trait}: the judge gave no coherence. Pass min_coherence=None to choose by the trait score "
                "alone, or sweep with a judge that scores coherence."
            )
        (layer, coefficient), highest = max(measured.items(), key=lambda item: item[1])
        return (
            f"{self.trait}: none of {len(coherence)} cells has a trait score and a mean coherence of {min_coherence:g} "
            f"or more; the most coherent is layer {layer} at {coefficient:g} with {highest:.1f}. "
            "Sweep smaller coefficients, or lower min_coherence."
        )

    def _tells_nothing(self, one: tuple[int, float], other: tuple[int, float]) -> bool:
        difference = self.evaluations[one].trait_score_resamples - self.evaluations[other].trait_score_resamples
        finite = difference[np.isfinite(difference)]
        return len(finite) < 2 or bool(np.percentile(finite, 2.5) <= 0)

    def dose_response(self, layer: int) -> dict[float, Evaluation]:
        """One layer's evaluations by coefficient, the baseline being coefficient 0."""
        if layer not in self.layers:
            raise ValueError(f"{self.trait}: layer {layer} was not swept, only {list(self.layers)}.")
        rows = {0.0: self.baseline} | {each: self.evaluations[layer, each] for each in self.coefficients}
        return dict(sorted(rows.items()))

    def table(self) -> "pandas.DataFrame":
        """A row for every cell, and first the baseline (layer -1, coefficient 0)."""
        import pandas

        cells: dict[tuple[int, float], Evaluation] = {(-1, 0.0): self.baseline, **self.evaluations}
        rows = [
            {
                "layer": layer,
                "coefficient": coefficient,
                "dose": 0.0 if layer < 0 else self.doses[layer, coefficient],
                **found.columns,
            }
            for (layer, coefficient), found in cells.items()
        ]
        return pandas.DataFrame(rows).set_index(["layer", "coefficient"])

    def screen_correlations(self) -> "pandas.DataFrame":
        """How well each cheap screen ranks the layers: Spearman with the swept trait score, at every coefficient.

        Intervals resample the sweep's questions; None where a screen was not measured or does not vary.
        """
        import pandas

        rows = [
            {"screen": name, "coefficient": coefficient, **self._ranked(values, coefficient)}
            for name, values in self.screens.items()
            for coefficient in self.coefficients
        ]
        return pandas.DataFrame(rows, columns=["screen", "coefficient", "spearman", "low", "high", "layers"])

    def _ranked(self, screen: Sequence[float | None], coefficient: float) -> dict[str, Any]:
        """Spearman of a screen with the trait score at one coefficient, over layers that have both."""
        cells = [self.evaluations[layer, coefficient] for layer in self.layers]
        both = [
            (value, cell)
            for value, cell in zip(screen, cells, strict=True)
            if value is not None and cell.trait_score.value is not None
        ]
        x = np.array([value for value, _ in both], dtype=float)
        swept = spearman(x, np.array([cell.trait_score.value for _, cell in both], dtype=float))
        resamples = np.array([cell.trait_score_resamples for _, cell in both]).reshape(len(both), N_RESAMPLES).T
        drawn = [spearman(x, row) for row in resamples[:RANK_RESAMPLES] if np.isfinite(row).all()]
        known = np.array([each for each in drawn if each is not None], dtype=float)
        found = Estimate.of(np.nan if swept is None else swept, known, len(both))
        return {"spearman": found.value, "low": found.low, "high": found.high, "layers": found.n}

    def save(self, folder: str | Path) -> None:
        """Write layer_sweep.json beside the rows that `select_layer` keeps in the folder; `load` reads both."""
        cells = [
            {
                "layer": layer,
                "coefficient": coefficient,
                "dose": self.doses[layer, coefficient],
                **found.summary(),
            }
            for (layer, coefficient), found in self.evaluations.items()
        ]
        record: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "trait": self.trait,
            "judge": self.judge,
            "plan": self.baseline.plan,
            "layers": list(self.layers),
            "coefficients": list(self.coefficients),
            "screens": {name: list(values) for name, values in self.screens.items()},
            "baseline": self.baseline.summary(),
            "cells": cells,
        }
        write_json(Path(folder) / SWEEP_FILE, record)

    @classmethod
    def load(cls, folder: str | Path) -> "LayerSweep":
        """The sweep of a folder in which `select_layer` ended.

        Raises FileNotFoundError where there is none, ValueError where it is of another version or damaged.
        """
        folder = Path(folder)
        file = folder / SWEEP_FILE
        if not file.exists():
            raise FileNotFoundError(f"No sweep in {folder}: make one with `persona-lens select-layer`.")
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if record["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {record['format_version']}, this persona_lens reads {FORMAT_VERSION}")
            cells = [each["interventions"] for each in [record["baseline"], *record["cells"]]]
            found = read_cells(folder, ROWS_NAME, cells, **record["plan"])
            places = [(each["layer"], each["coefficient"]) for each in record["cells"]]
            return cls(
                record["trait"],
                record["judge"],
                tuple(record["layers"]),
                tuple(record["coefficients"]),
                found[0],
                dict(zip(places, found[1:], strict=True)),
                dict(zip(places, [each["dose"] for each in record["cells"]], strict=True)),
                {name: tuple(values) for name, values in record["screens"].items()},
            )
        except DAMAGE as error:
            raise ValueError(
                f"{file} is not a whole sweep ({error}): run `persona-lens select-layer` again."
            ) from error


@writes_output
@keeps_date
def select_layer(
    model: Model,
    vectors: PersonaVectors,
    trait: Trait | str,
    *,
    judge: Judge,
    layers: Sequence[int] | None = None,
    coefficients: Sequence[float] = (1.0, 2.0, 4.0),
    questions: Sequence[str] | None = None,
    per_question: int = 1,
    texts: FixedTexts | None = None,
    likelihood_screen: bool = True,
    at: NamedPositions = "response",
    max_new_tokens: int = 1000,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 120,
    allow_other_model: bool = False,
    output: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LayerSweep:
    """Steer every layer by its own direction at every coefficient, and judge the answers.

    `layers` default to all, `questions` to the trait's extraction questions; the recommended layer is then confirmed on
    evaluation questions by `dose_response`. Rows of all cells are mixed in batched generation, where those of one
    question share its prompt, and the unsteered answers are sampled once. `texts` are what the likelihood screen reads
    (default: the kept pairs of an extraction in `output`); `likelihood_screen=False` leaves that one out. With
    `output`, a folder, every batch is kept as it is made (sweep_rollouts.jsonl, sweep_scores.jsonl,
    layer_sweep.json), and a second call goes on where the first one stopped.

    Raises ValueError for layers out of range, repeated or zero coefficients, vectors of another model, or an `output`
    that holds a sweep made otherwise. Source: arXiv:2507.21509, section B.4.
    """
    trait = load_trait(trait) if isinstance(trait, str) else trait
    layers = vectors.known_layers if layers is None else sorted(set(layers))
    amounts = [float(coefficient) for coefficient in coefficients]
    cells = _cells(vectors, layers, amounts)
    Steer(vectors).check(model, allow_other_model=allow_other_model)
    asked = scorable_questions(judge, trait, trait.extraction_questions if questions is None else questions)
    folder = None if output is None else Path(output)
    if folder is not None:
        refuse_other_json(folder / SWEEP_FILE, ("format_version", "trait", "cells"))
        texts = fixed_texts(folder, trait) if texts is None and likelihood_screen else texts
    if progress:
        rows = len(asked) * per_question * (len(cells) + 1)
        tqdm.write(
            f"{trait.name}: {len(layers)} layers x {len(amounts)} coefficients x {len(asked)} questions, "
            f"{rows} rollouts with the unsteered ones, at most {rows * max_new_tokens:,} sampled tokens.",
            file=sys.stderr,
        )
    baseline, *found = evaluate_cells(
        model,
        trait,
        judge,
        list(cells.values()),
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
    middle = sorted(amounts, key=abs)[len(amounts) // 2]
    screens = screen_layers(
        model,
        vectors,
        trait,
        layers=layers,
        coefficient=middle,
        texts=texts,
        at=at,
        allow_other_model=allow_other_model,
        progress=progress,
    )
    sweep = LayerSweep(
        trait.name,
        judge.name(trait),
        tuple(layers),
        tuple(amounts),
        baseline,
        dict(zip(cells, found, strict=True)),
        {place: Steer(cell.vector, cell.coefficient).doses[0] for place, cell in cells.items()},
        screens,
    )
    if folder is not None:
        sweep.save(folder)
    return sweep


def _cells(
    vectors: PersonaVectors, layers: Sequence[int], coefficients: Sequence[float]
) -> dict[tuple[int, float], Cell]:
    if not coefficients or 0.0 in coefficients or len(set(coefficients)) < len(coefficients) or not layers:
        raise ValueError(
            f"A sweep needs layers, and distinct coefficients other than 0 (which is always swept); got {list(layers)} "
            f"and {list(coefficients)}."
        )
    return {(layer, amount): Cell(vectors.at(layer), amount) for layer in layers for amount in coefficients}
