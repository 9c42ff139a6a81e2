"""How good the direction of each layer is: separation, stability, and the placebo that each must beat.

Every number comes from resampling questions, because the rows of one question are not independent.
Knows nothing about how the numbers are computed; extraction fills them in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isnan, nan
from typing import Any

from jaxtyping import Float
from torch import Tensor

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
        """The statistics that have one value for each layer, by name, in the order of the fields."""
        others = {"n_questions", "n_rows", "seed", "embedding"}
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in others}

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
