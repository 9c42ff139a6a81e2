"""What a finetuning shift is as a value: each prompt's, its mean with its interval, and its controls, by layer.

Knows nothing about models: numbers come in, tables and files go out.
"""

import json
import os
from dataclasses import dataclass, field
from math import ceil, isnan, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.records import DAMAGE, checked, write_json
from persona_lens.statistics import Estimate, mean_estimate
from persona_lens.vectors import refuse_absent_layer

if TYPE_CHECKING:
    import pandas

FORMAT_VERSION = 1
_TENSORS = ("projections", "norms", "mean_norms", "base_norms")


@dataclass(frozen=True, eq=False)
class FinetuningShift:
    """How far finetuning moved the last prompt token, at every layer, with what to hold the number against.

    Attributes:
        traits: The traits that were projected on.
        questions: What the prompts asked, one prompt each.
        projections: Scalar projection of each prompt's difference, finetuned minus base, on each trait's unit vector;
            NaN at layers that the trait was given no vector for.
        norms: Euclidean norm of each prompt's difference.
        mean_norms: Euclidean norm of the mean difference over the prompts.
        base_norms: Mean norm of the base's residual stream at those tokens.
        d_model: Width of the residual stream.
        settings: What it was made with: models, system prompt, vectors.
        seed: Seed of the bootstrap.

    Limits: it says where the model stands as it begins to answer, and a finetuned model may turn later on.
    """

    traits: tuple[str, ...]
    questions: tuple[str, ...] = field(repr=False)
    projections: Float[Tensor, "prompt vector layer"] = field(repr=False)
    norms: Float[Tensor, "prompt layer"] = field(repr=False)
    mean_norms: Float[Tensor, " layer"] = field(repr=False)
    base_norms: Float[Tensor, " layer"] = field(repr=False)
    d_model: int
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        layers = list(self.mean_norms.shape)
        for name, expected in (
            ("projections", [len(self.questions), len(self.traits), *layers]),
            ("norms", [len(self.questions), *layers]),
            ("base_norms", layers),
        ):
            if (got := list(getattr(self, name).shape)) != expected:
                raise ValueError(f"A shift of these prompts and traits needs {name} of shape {expected}, got {got}.")

    @property
    def n_layers(self) -> int:
        """How many layers the models have."""
        return self.mean_norms.shape[0]

    @property
    def random_spread(self) -> Float[Tensor, " layer"]:
        """The control: standard deviation of the mean shift along random unit directions, uniform on the sphere.

        In closed form: a fixed vector's projection on such a direction has mean 0 and standard deviation
        |vector| / sqrt(d_model). Its limit: real streams vary more along some directions than along others.
        """
        return self.mean_norms / sqrt(self.d_model)

    def layers(self, trait: str | None = None) -> list[int]:
        """The layers at which there is a vector of the trait, which may be left out where there is one trait only."""
        held = self.projections[0, self._place(trait)].isfinite()
        return [layer for layer in range(self.n_layers) if held[layer]]

    def at(self, layer: int, trait: str | None = None) -> Estimate:
        """The trait's mean shift at a layer, counted from 0, with its interval over prompts.

        Raises ValueError for a layer or trait that was not measured.
        """
        place = self._place(trait)
        refuse_absent_layer(self.traits[place], layer, self.n_layers)
        values = self.projections[:, place, layer].tolist()
        if isnan(values[0]):
            raise ValueError(
                f"{self.traits[place]}: the shift was measured at layers {self.layers(trait)}, got layer {layer}: "
                "measure it with the vectors of every layer."
            )
        return mean_estimate(values, self.questions, seed=self.seed)

    def curve(self, trait: str | None = None) -> "pandas.DataFrame":
        """The trait's shift by layer: `shift`, `low`, `high`, and what to hold it against.

        `norm` is the length of the whole mean difference, `relative` the shift over the base's mean residual norm,
        `cosine` how much of the difference lies along the vector (NaN where nothing moved), `random_spread` the
        control.
        """
        import pandas

        layers = self.layers(trait)
        found = [self.at(layer, trait) for layer in layers]
        index = pandas.Index(layers, name="layer")
        table = pandas.DataFrame({"shift": [each.value for each in found]}, index=index, dtype=float)
        table["low"], table["high"] = ([getattr(each, end) for each in found] for end in ("low", "high"))
        table["norm"] = self.mean_norms[layers].tolist()
        table["relative"] = table["shift"] / self.base_norms[layers].tolist()
        table["cosine"] = table["shift"] / table["norm"]
        table["random_spread"] = self.random_spread[layers].tolist()
        return table.astype(float)

    def table(self) -> "pandas.DataFrame":
        """The curves of all traits under each other, by `trait` and `layer`."""
        import pandas

        return pandas.concat({trait: self.curve(trait) for trait in self.traits}, names=["trait"])

    def summary(self) -> dict[str, Any]:
        """The result as JSON; what is undefined is None."""
        curves = {trait: self.curve(trait).reset_index() for trait in self.traits}
        return {
            "prompts": len(self.questions),
            # pandas writes ten decimals unless told otherwise, and 15 at most.
            "traits": {
                trait: json.loads(curve.to_json(orient="records", double_precision=15) or "[]")
                for trait, curve in curves.items()
            },
        }

    def __str__(self) -> str:
        return "\n".join(self._line(trait) for trait in self.traits)

    def _line(self, trait: str) -> str:
        # Quarters of the depth, so that no layer is chosen by its result.
        layers = self.layers(trait)
        shown = sorted({layers[ceil(len(layers) * quarter / 4) - 1] for quarter in (1, 2, 3, 4)})
        parts = (f"layer {layer} {_decimals(self.at(layer, trait), self.random_spread[layer])}" for layer in shown)
        return f"{trait}, shift over {len(self.questions)} prompts: {'; '.join(parts)}"

    def _place(self, trait: str | None) -> int:
        if trait is None and len(self.traits) == 1:
            return 0
        if trait not in self.traits:
            raise ValueError(
                f"The shift was measured along {', '.join(self.traits)}, got {trait!r}: name one of these."
            )
        return self.traits.index(trait)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON, whole or not at all."""
        record = {name: getattr(self, name) for name in ("traits", "questions", "d_model", "settings", "seed")}
        tensors = {name: _listed(getattr(self, name).tolist()) for name in _TENSORS}
        write_json(Path(path), {"format_version": FORMAT_VERSION, **record, "summary": self.summary(), **tensors})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FinetuningShift":
        """What `save` wrote; raises ValueError where the file is damaged or of another format."""
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            if saved["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {saved['format_version']}, and this reads {FORMAT_VERSION}")
            # numpy takes None for the NaN that it stands for.
            with np.errstate(over="raise"):  # a number that float32 has not
                tensors = {name: torch.from_numpy(np.array(saved[name], dtype=np.float32)) for name in _TENSORS}
            names = {name: tuple(saved[name]) for name in ("traits", "questions")}
            checked(saved["seed"], int, low=0)
            checked(saved["d_model"], int, low=1)
            checked(saved["settings"], dict)
            for each in (*saved["traits"], *saved["questions"]):
                checked(each, str)
            found = cls(**names, **tensors, **{name: saved[name] for name in ("d_model", "settings", "seed")})
            if bare := [trait for trait in found.traits if not found.layers(trait)]:
                raise ValueError(f"no layer of {bare[0]} has a number")
            return found
        except DAMAGE as error:
            raise ValueError(f"{path} is not a finetuning shift ({error}): measure it again.") from error


def _listed(values: Any) -> Any:
    """Nested lists with None for NaN, which JSON has not."""
    if isinstance(values, list):
        return [_listed(value) for value in values]
    return None if isnan(values) else values


def _decimals(found: Estimate, spread: Tensor) -> str:
    interval = "" if found.low is None else f" [{found.low:.3g}, {found.high:.3g}]"
    return f"{found.value:.3g}{interval} (random directions ±{float(spread):.2g})"
