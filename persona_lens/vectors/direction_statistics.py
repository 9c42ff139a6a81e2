"""How good a difference in means is: bootstrap, split halves, a placebo, and a held-out AUC, all over questions.

Questions are resampled because the rows of one question are not independent. Every direction that these statistics need
is a weighted sum of cell sums (a cell is one question, instruction and polarity), so they are computed from products
with those sums alone: a rollout's activations are read once a layer, whatever the number of resamples.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from math import isnan, nan
from typing import Any

import numpy as np
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from persona_lens.statistics import auc, question_resamples, resampled_auc
from persona_lens.vectors.directions import owned


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerStatistics:
    """How good the direction of each layer is; NaN where a number is undefined, as with a single question.

    `_low` and `_high` are the ends of a 95 % bootstrap interval over questions.

    Attributes:
        held_out_auc: How well the projection separates the two sides on questions left out of the direction.
        held_out_auc_low: Lower end.
        held_out_auc_high: Upper end.
        placebo_auc_95: 95th percentile of `held_out_auc` when polarity is swapped at random.
        split_half: Mean cosine of the directions of two disjoint halves of the questions.
        split_half_low: Lower end.
        split_half_high: Upper end.
        bootstrap_cosine_low: 2.5th percentile of the cosine of a bootstrap direction with the full one.
        placebo_norm_95: 95th percentile of a placebo direction's norm over the real norm.
        n_questions: Questions that were resampled.
        n_rows: Responses behind the direction, both sides together.
        seed: Seed of the resampling.
        embedding: The same numbers, under the same names, of the embedding row (the lexical control).
    """

    held_out_auc: Float[Tensor, " layer"]
    held_out_auc_low: Float[Tensor, " layer"]
    held_out_auc_high: Float[Tensor, " layer"]
    placebo_auc_95: Float[Tensor, " layer"]
    split_half: Float[Tensor, " layer"]
    split_half_low: Float[Tensor, " layer"]
    split_half_high: Float[Tensor, " layer"]
    bootstrap_cosine_low: Float[Tensor, " layer"]
    placebo_norm_95: Float[Tensor, " layer"]
    n_questions: int
    n_rows: int
    seed: int
    embedding: dict[str, float] | None = None

    def __post_init__(self) -> None:
        for name, values in self.by_layer.items():
            if values.ndim != 1 or values.shape != self.held_out_auc.shape:
                raise ValueError(f"{name} has shape {list(values.shape)}: every statistic needs one value a layer.")
            object.__setattr__(self, name, owned(values))
        if self.embedding is None:
            return
        object.__setattr__(self, "embedding", {name: float(value) for name, value in self.embedding.items()})
        if set(self.embedding) != set(self.by_layer):
            wrong = sorted(set(self.embedding) ^ set(self.by_layer))
            raise ValueError(f"The embedding row needs the statistics of the layers; missing or unknown: {wrong}.")

    def __repr__(self) -> str:
        best = "undefined"
        if not self.held_out_auc.isnan().all():
            layer = int(self.held_out_auc.nan_to_num(nan=-1).argmax())
            best = f"{float(self.held_out_auc[layer]):.3f} at layer {layer}"
        return f"LayerStatistics(n_questions={self.n_questions}, n_rows={self.n_rows}, best held_out_auc: {best})"

    @property
    def by_layer(self) -> dict[str, Float[Tensor, " layer"]]:
        """The `METRICS`, one value for each layer, in the order of the fields."""
        return {name: getattr(self, name) for name in METRICS}

    def header(self) -> dict[str, Any]:
        """The part that a file keeps as JSON, which has no NaN; the rest is `by_layer`."""
        row = self.embedding
        if row is not None:
            row = {name: None if isnan(value) else value for name, value in row.items()}
        return {"n_questions": self.n_questions, "n_rows": self.n_rows, "seed": self.seed, "embedding": row}

    @classmethod
    def from_header(cls, header: Mapping[str, Any], by_layer: Mapping[str, Tensor]) -> "LayerStatistics":
        """The statistics that a file keeps as `header` and `by_layer`."""
        row = header["embedding"]
        if row is not None:
            row = {name: nan if value is None else value for name, value in row.items()}
        return cls(**by_layer, **{**header, "embedding": row})


METRICS = tuple(f.name for f in fields(LayerStatistics) if f.name not in ("n_questions", "n_rows", "seed", "embedding"))


@dataclass(frozen=True)
class Design:
    """Which row belongs where: for each row its question, its instruction and whether it is positive."""

    questions: tuple[str, ...]
    instructions: tuple[str, ...]
    positive: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not len(self.questions) == len(self.instructions) == len(self.positive):
            raise ValueError("Every row needs a question, an instruction and a polarity.")
        if all(self.positive) or not any(self.positive):
            raise ValueError("A difference in means needs rows of both polarities.")

    @cached_property
    def row_question(self) -> np.ndarray:
        """The number of each row's question [row]."""
        return _number(self.questions)

    @cached_property
    def row_pair(self) -> np.ndarray:
        """The number of each row's (question, instruction) [row]."""
        return _number(tuple(zip(self.questions, self.instructions, strict=True)))

    @cached_property
    def row_cell(self) -> np.ndarray:
        """The number of each row's cell [row]."""
        return self.row_pair * 2 + np.array(self.positive)

    @cached_property
    def n_cells(self) -> int:
        """Twice the number of (question, instruction) pairs; a cell may be empty."""
        return 2 * (int(self.row_pair.max()) + 1)

    @cached_property
    def cell_count(self) -> np.ndarray:
        """Rows in each cell [cell]."""
        return np.bincount(self.row_cell, minlength=self.n_cells).astype(float)

    @cached_property
    def cell_question(self) -> np.ndarray:
        """The number of each cell's question [cell]."""
        of_pair = np.zeros(self.n_cells // 2, dtype=int)
        of_pair[self.row_pair] = self.row_question
        return np.repeat(of_pair, 2)

    @cached_property
    def n_questions(self) -> int:
        """Distinct questions."""
        return int(self.row_question.max()) + 1

    def cell_sums(self, rows: np.ndarray) -> np.ndarray:
        """Sums [cell d_model], in float64, of row means [row d_model]."""
        sums = np.zeros((self.n_cells, rows.shape[1]))
        np.add.at(sums, self.row_cell, rows.astype(np.float64))
        return sums

    def coefficients(self, question_weights: np.ndarray, sign: np.ndarray | None = None) -> np.ndarray:
        """Cells' weights [..., cell] such that weights @ cell_sums is the difference in means.

        `question_weights` [..., question] says how often each question counts; `sign` [..., pair] is -1 where a pair's
        polarity is swapped (the placebo). NaN where a side has no rows.
        """
        side = np.tile([-1.0, 1.0], self.n_cells // 2)
        if sign is not None:
            side = side * np.repeat(sign, 2, axis=-1)
        weights = question_weights[..., self.cell_question]
        return self._averaging(weights * (side == 1)) - self._averaging(weights * (side == -1))

    def _averaging(self, weights: np.ndarray) -> np.ndarray:
        """Cells' weights [..., cell] scaled so that their rows' weights sum to 1; NaN where no row has any."""
        return _over(weights, (weights * self.cell_count).sum(axis=-1, keepdims=True))


def _number(labels: tuple) -> np.ndarray:
    places = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    return np.array([places[label] for label in labels])


def direction_metrics(
    rows: np.ndarray, design: Design, *, n_resamples: int = 200, n_placebo: int = 100, seed: int = 0
) -> dict[str, float]:
    """The `METRICS` (see `LayerStatistics`) of one layer's direction from its row means; NaN where undefined.

    For the held-out AUC each question's rows, measured from the mean of all rows, are projected on the unit direction
    of all other questions, and the projections are pooled. A placebo swaps the polarity at random within (question,
    instruction).
    """
    if design.n_questions < 2:
        return dict.fromkeys(METRICS, float("nan"))
    generator = np.random.default_rng(seed)
    rows = _centred(rows)
    sums = design.cell_sums(rows)
    products = einsum(rows, sums, "row d_model, cell d_model -> row cell")
    gram = einsum(sums, sums, "one d_model, other d_model -> one other")
    full = design.coefficients(np.ones(design.n_questions))

    projections = held_out_projections(products, gram, design)
    positive = np.array(design.positive)
    weights = question_resamples(design.n_questions, n_resamples, seed)
    resampled = resampled_auc(
        projections[positive],
        projections[~positive],
        weights[:, design.row_question[positive]],
        weights[:, design.row_question[~positive]],
    )
    placebo_auc, placebo_norm = _placebo(products, gram, design, n_placebo, generator)
    halves = _split_halves(gram, design, n_resamples, generator)
    bootstrap = cosines(gram, design.coefficients(weights.astype(float)), full)
    return {
        "held_out_auc": _auc(projections, positive),
        "held_out_auc_low": _percentile(resampled, 2.5),
        "held_out_auc_high": _percentile(resampled, 97.5),
        "placebo_auc_95": _percentile(placebo_auc, 95.0),
        "split_half": float(np.nanmean(halves)) if np.isfinite(halves).any() else float("nan"),
        "split_half_low": _percentile(halves, 2.5),
        "split_half_high": _percentile(halves, 97.5),
        "bootstrap_cosine_low": _percentile(bootstrap, 2.5),
        "placebo_norm_95": _percentile(_over(placebo_norm, _norms(gram, full)), 95.0),
    }


def _centred(rows: np.ndarray) -> np.ndarray:
    """Rows [row d_model] in float64, measured from their mean.

    The directions stay the same, and a mean that is large beside them costs no digits. Projections on the directions of
    different questions are pooled, and the mean's own projection differs among them: left in, it hides the trait.
    """
    rows = rows.astype(np.float64)
    centred = rows - rows.mean(axis=0)
    # Where all rows are equal (the embedding of the last prompt token), what rounding leaves over is no direction.
    centred[np.abs(centred) <= 1e-9 * np.abs(rows).max()] = 0
    return centred


def held_out_projections(
    products: np.ndarray, gram: np.ndarray, design: Design, sign: np.ndarray | None = None
) -> np.ndarray:
    """Each row's projection [..., row] on the unit direction made of all questions but its own."""
    others = 1.0 - np.eye(design.n_questions)
    coefficients = design.coefficients(others, None if sign is None else sign[..., None, :])
    units = _over(coefficients, _norms(gram, coefficients)[..., None])
    return einsum(units[..., design.row_question, :], products, "... row cell, row cell -> ... row")


def cosines(gram: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosines [...] of directions that are given by their cells' weights [..., cell]."""
    product = einsum(one @ gram, np.broadcast_to(other, one.shape), "... cell, ... cell -> ...")
    return _over(product, _norms(gram, one) * _norms(gram, other))


def _norms(gram: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    squared = einsum(coefficients @ gram, coefficients, "... cell, ... cell -> ...")
    return np.asarray(np.sqrt(np.maximum(squared, 0)))


def _placebo(
    products: np.ndarray, gram: np.ndarray, design: Design, n_placebo: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    aucs, norms = [], []
    positive = np.array(design.positive)
    for _ in range(n_placebo):
        sign = generator.choice([-1.0, 1.0], size=design.n_cells // 2)
        norms.append(_norms(gram, design.coefficients(np.ones(design.n_questions), sign)))
        projections = held_out_projections(products, gram, design, sign)
        label = positive == (sign[design.row_pair] > 0)
        aucs.append(_auc(projections, label))
    return np.array(aucs), np.array(norms)


def _split_halves(gram: np.ndarray, design: Design, n_splits: int, generator: np.random.Generator) -> np.ndarray:
    half = design.n_questions // 2
    in_first = np.zeros((n_splits, design.n_questions))
    for row in in_first:
        row[generator.permutation(design.n_questions)[:half]] = 1
    return cosines(gram, design.coefficients(in_first), design.coefficients(1 - in_first))


def _over(values: Any, divisors: Any) -> np.ndarray:
    """Values / divisors; NaN where a divisor is 0."""
    return np.asarray(values / np.where(divisors > 0, divisors, np.nan))


def _percentile(values: np.ndarray, q: float) -> float:
    finite = values[np.isfinite(values)]
    return float(np.percentile(finite, q)) if finite.size else float("nan")


def _auc(projections: np.ndarray, positive: np.ndarray) -> float:
    area = auc(projections[positive], projections[~positive])
    return float("nan") if area is None else area
