"""Choose a layer to steer: steer every layer at the same coefficients, judge the answers, take the best cell.

All cells are mixed in batched generation. Beside the sweep stand the cheap proxies of `layer_proxies`, so that one can
see which of them would have predicted its result. Source: arXiv:2507.21509, section B.4.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from persona_lens.evaluation.evaluate import Evaluation, evaluate_cells, read_cells
from persona_lens.evaluation.layer_proxies import FixedTexts, fixed_texts, likelihood_ratio_changes, stored_proxies
from persona_lens.interventions.positions import NamedPositions
from persona_lens.interventions.values import Steer
from persona_lens.judges.scores import Judge, scorable_questions
from persona_lens.models.structure import Model
from persona_lens.rollouts.collection import keeps_date
from persona_lens.rollouts.engines import Cell, CellEngine, ModelEngine
from persona_lens.statistics import N_RESAMPLES, Estimate, spearman
from persona_lens.storage.files import read_result, refuse_other_json, write_json
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
        ties: Other cells (layer, coefficient) whose trait score is not significantly lower.
        reason: Why it was chosen, in one sentence.
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
    """Every layer steered at the same coefficients. Drawn by `pl.plots.layer_sweep` and `pl.plots.frontier`.

    Attributes:
        trait: Name of the judged trait.
        judge: Name of the judge.
        layers: Ascending, counted from 0.
        coefficients: As steered.
        baseline: The evaluation without steering.
        evaluations: By (layer, coefficient).
        doses: Coefficient times |v| over the stored residual norm, by (layer, coefficient); None where unknown.
        proxies: Cheap proxies of each layer, in the order of `layers`; see `layer_proxies.PROXIES`.
    """

    trait: str
    judge: str
    layers: tuple[int, ...]
    coefficients: tuple[float, ...]
    baseline: Evaluation
    evaluations: Mapping[tuple[int, float], Evaluation] = field(repr=False)
    doses: Mapping[tuple[int, float], float | None] = field(repr=False)
    proxies: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict, repr=False)

    def best(self, min_coherence: float | None = 75.0) -> LayerChoice:
        """The cell with the highest mean trait score among those with a mean coherence of at least `min_coherence`.

        With None coherence does not count: for a judge that gives none, and for the paper's own rule. Ties are the
        cells whose difference from the best has a 95 % interval, paired by question, that includes 0. As the best of
        many, its score is optimistic: confirm it on other questions with `dose_response`.

        Raises ValueError where no cell is coherent enough. Source: arXiv:2507.21509, section B.4; coherence is ours.
        """

        def is_eligible(cell: Evaluation) -> bool:
            coherence = cell.coherence.value
            coherent = min_coherence is None or (coherence is not None and coherence >= min_coherence)
            return coherent and cell.trait_score.value is not None

        eligible = {place: cell for place, cell in self.evaluations.items() if is_eligible(cell)}
        if not eligible:
            raise ValueError(self._why_none(min_coherence))
        best = max(eligible, key=lambda place: eligible[place].trait_score.value or 0.0)
        cell = self.evaluations[best]
        ties = tuple(place for place, other in eligible.items() if place != best and _may_tie(cell, other))
        layer, coefficient = best
        rule = "trait score" if min_coherence is None else f"mean coherence of {min_coherence:g} or more"
        reason = (
            f"layer {layer} at {coefficient:g} has the highest {self.trait} score, {cell.trait_score} against "
            f"{self.baseline.trait_score} unsteered, of the {len(eligible)} of {len(self.evaluations)} cells with a "
            f"{rule}" + f"; {len(ties)} others tie with it within their intervals" * bool(ties)
        )
        return LayerChoice(layer, coefficient, self.doses[best], cell.trait_score, cell.coherence, ties, reason)

    def _why_none(self, min_coherence: float | None) -> str:
        n = len(self.evaluations)
        if min_coherence is None:
            return f"{self.trait}: the judge gave none of {n} cells a trait score: use another judge."
        measured = {
            place: cell.coherence.value for place, cell in self.evaluations.items() if cell.coherence.value is not None
        }
        if not measured:
            return (
                f"{self.trait}: the judge gave no coherence. Pass min_coherence=None to choose by the trait score "
                "alone, or sweep with a judge that scores coherence."
            )
        (layer, coefficient), highest = max(measured.items(), key=lambda item: item[1])
        return (
            f"{self.trait}: none of {n} cells has a trait score and a mean coherence of {min_coherence:g} or more; the "
            f"most coherent is layer {layer} at {coefficient:g} with {highest:.1f}. Sweep smaller coefficients, or "
            "lower min_coherence."
        )

    def dose_response(self, layer: int) -> dict[float, Evaluation]:
        """One layer's evaluations by ascending coefficient; coefficient 0 is the baseline."""
        if layer not in self.layers:
            raise ValueError(f"{self.trait}: layer {layer} was not swept, only {list(self.layers)}.")
        steered = {coefficient: self.evaluations[layer, coefficient] for coefficient in self.coefficients}
        return dict(sorted({0.0: self.baseline, **steered}.items()))

    def table(self) -> "pandas.DataFrame":
        """A row for each cell, after the baseline (layer -1, coefficient 0)."""
        import pandas

        baseline = {"layer": -1, "coefficient": 0.0, "dose": 0.0, **self.baseline.columns}
        rows = [{**place, **cell.columns} for place, cell in self._rows()]
        return pandas.DataFrame([baseline, *rows]).set_index(["layer", "coefficient"])

    def _rows(self) -> list[tuple[dict[str, Any], Evaluation]]:
        """Each cell's evaluation with its `layer`, `coefficient` and `dose`."""
        return [
            ({"layer": place[0], "coefficient": place[1], "dose": self.doses[place]}, cell)
            for place, cell in self.evaluations.items()
        ]

    def proxy_correlations(self) -> "pandas.DataFrame":
        """How well each proxy ranks the layers: its Spearman correlation with the trait score, at every coefficient.

        Intervals resample the sweep's questions; None where a proxy was not measured or does not vary.
        """
        import pandas

        rows = [
            {"proxy": name, "coefficient": coefficient, **self._rank_correlation(values, coefficient)}
            for name, values in self.proxies.items()
            for coefficient in self.coefficients
        ]
        return pandas.DataFrame(rows, columns=["proxy", "coefficient", "spearman", "low", "high", "layers"])

    def _rank_correlation(self, proxy: Sequence[float | None], coefficient: float) -> dict[str, Any]:
        """Spearman of a proxy with the trait score at one coefficient, over the layers that have both."""
        pairs = [
            (value, cell)
            for value, layer in zip(proxy, self.layers, strict=True)
            if (cell := self.evaluations[layer, coefficient]).trait_score.value is not None and value is not None
        ]
        x = np.array([value for value, _ in pairs], dtype=float)
        rank = spearman(x, np.array([cell.trait_score.value for _, cell in pairs], dtype=float))
        resamples = np.array([cell.trait_score_resamples for _, cell in pairs]).reshape(len(pairs), N_RESAMPLES).T
        ranks = [spearman(x, scores) for scores in resamples[:RANK_RESAMPLES] if np.isfinite(scores).all()]
        finite = np.array([value for value in ranks if value is not None], dtype=float)
        estimate = Estimate.of(np.nan if rank is None else rank, finite, len(pairs))
        return {"spearman": estimate.value, "low": estimate.low, "high": estimate.high, "layers": estimate.n}

    def save(self, folder: str | Path) -> None:
        """Write layer_sweep.json beside the rows that `select_layer` keeps in the folder; `load` reads both."""
        record: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "trait": self.trait,
            "judge": self.judge,
            "plan": self.baseline.plan,
            "layers": list(self.layers),
            "coefficients": list(self.coefficients),
            "screens": {name: list(values) for name, values in self.proxies.items()},
            "baseline": self.baseline.summary(),
            "cells": [{**place, **cell.summary()} for place, cell in self._rows()],
        }
        write_json(Path(folder) / SWEEP_FILE, record)

    @classmethod
    def load(cls, folder: str | Path) -> "LayerSweep":
        """Read the sweep of a folder in which `select_layer` finished.

        Raises FileNotFoundError where there is none, ValueError where it is of another version or damaged.
        """
        folder = Path(folder)
        parse = partial(cls._from_record, folder)
        return read_result(folder / SWEEP_FILE, FORMAT_VERSION, parse, "layer sweep", "select_layer")

    @classmethod
    def _from_record(cls, folder: Path, record: Mapping[str, Any]) -> "LayerSweep":
        interventions = [cell["interventions"] for cell in [record["baseline"], *record["cells"]]]
        baseline, *cells = read_cells(folder, ROWS_NAME, interventions, record["plan"])
        places = [(cell["layer"], cell["coefficient"]) for cell in record["cells"]]
        return cls(
            record["trait"],
            record["judge"],
            tuple(record["layers"]),
            tuple(record["coefficients"]),
            baseline,
            dict(zip(places, cells, strict=True)),
            dict(zip(places, [cell["dose"] for cell in record["cells"]], strict=True)),
            {name: tuple(values) for name, values in record["screens"].items()},
        )


def _may_tie(best: Evaluation, other: Evaluation) -> bool:
    """Whether the interval of the difference includes 0, or cannot be had."""
    difference = best.trait_score_resamples - other.trait_score_resamples
    finite = difference[np.isfinite(difference)]
    return len(finite) < 2 or bool(np.percentile(finite, 2.5) <= 0)


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
    likelihood_proxy: bool = True,
    at: NamedPositions = "response",
    max_new_tokens: int = 1000,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 120,
    allow_other_model: bool = False,
    output_dir: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LayerSweep:
    """Steer every layer by its own direction at every coefficient, and judge the answers.

    `layers` default to all, `questions` to the trait's extraction questions; confirm the recommended layer on
    evaluation questions with `dose_response`. The unsteered answers are sampled once. `texts` are what the likelihood
    proxy reads (default: the kept pairs of an extraction in `output_dir`); `likelihood_proxy=False` leaves it out.
    `output_dir` keeps sweep_rollouts.jsonl, sweep_scores.jsonl and layer_sweep.json; a second call continues where the
    first stopped.

    Raises ValueError for layers out of range, repeated or zero coefficients, vectors of another model, or an
    `output_dir` that holds a sweep with other settings. Source: arXiv:2507.21509, section B.4.
    """
    trait = load_trait(trait) if isinstance(trait, str) else trait
    layers = vectors.known_layers if layers is None else sorted(set(layers))
    coefficients = [float(coefficient) for coefficient in coefficients]
    cells = _cells(vectors, layers, coefficients)
    Steer(vectors).check(model, allow_other_model=allow_other_model)
    questions = scorable_questions(judge, trait, trait.extraction_questions if questions is None else questions)
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        refuse_other_json(folder / SWEEP_FILE, ("format_version", "trait", "cells"))
        texts = fixed_texts(folder, trait) if texts is None and likelihood_proxy else texts
    if progress:
        rows = len(questions) * per_question * (len(cells) + 1)
        tqdm.write(
            f"{trait.name}: {len(layers)} layers x {len(coefficients)} coefficients x {len(questions)} questions, "
            f"{rows} rollouts with the unsteered ones, at most {rows * max_new_tokens:,} sampled tokens.",
            file=sys.stderr,
        )
    engine = ModelEngine(model, max_new_tokens, temperature, top_p, batch_size)
    baseline, *evaluations = evaluate_cells(
        CellEngine(engine, {cell.name: cell for cell in cells.values()}, at, allow_other_model),
        trait,
        judge=judge,
        questions=questions,
        per_question=per_question,
        folder=folder,
        name=ROWS_NAME,
        seed=seed,
        progress=progress,
    )
    proxies = stored_proxies(vectors, layers)
    if texts is not None:
        changes = likelihood_ratio_changes(
            model,
            vectors,
            trait,
            texts,
            layers=layers,
            coefficient=sorted(coefficients, key=abs)[len(coefficients) // 2],
            at=at,
            allow_other_model=allow_other_model,
            progress=progress,
        )
        proxies["likelihood_ratio_change"] = tuple(changes)
    sweep = LayerSweep(
        trait.name,
        judge.name(trait),
        tuple(layers),
        tuple(coefficients),
        baseline,
        dict(zip(cells, evaluations, strict=True)),
        {place: Steer(cell.vector, cell.coefficient).doses[0] for place, cell in cells.items()},
        proxies,
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
