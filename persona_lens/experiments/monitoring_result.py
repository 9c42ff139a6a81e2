"""What a monitoring experiment found: one point for each condition and question, and how its two sides correlate.

Pearson's correlation of the last prompt token's projection with the mean trait score, over all points, and within
conditions: the mean over conditions of the correlation of their points, those whose scores hardly vary (standard
deviation below 1) left out (arXiv:2507.21509, section 3.3 and appendix C).
Knows nothing about models.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_lens.records import DAMAGE, checked, write_json
from persona_lens.statistics import N_RESAMPLES, Estimate, pearson, question_resamples, resampled_pearson

if TYPE_CHECKING:
    import pandas

FORMAT_VERSION = 1
MIN_SPREAD = 1.0


@dataclass(frozen=True)
class Point:
    """One question in one condition.

    Attributes:
        condition: The condition's name.
        question: What was asked.
        projections: Of the last prompt token on the unit vector, at every layer.
        trait_score: Mean over the responses that have one, 0 to 100; None where none has.
        scored: How many those are.
        responses: How many there were.
    """

    condition: str
    question: str
    projections: tuple[float, ...]
    trait_score: float | None
    scored: int
    responses: int


@dataclass(frozen=True)
class MonitoringExperiment:
    """The points of an experiment, conditions in their order.

    Attributes:
        trait: The trait that was judged, and whose vectors were projected on.
        layer: The layer that was chosen before; its correlations are the result, those of the others the curve.
        points: One for each condition and question.
        settings: What it was made with: judge, engine, vectors, numbers.
        seed: Seed of the bootstrap.

    Limits: the overall correlation is mostly that of the conditions' means, which a monitor would see in the system
    prompt itself; what it adds shows within conditions.
    """

    trait: str
    layer: int
    points: tuple[Point, ...] = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def conditions(self) -> list[str]:
        """Their names, in order."""
        return list(dict.fromkeys(point.condition for point in self.points))

    @property
    def n_layers(self) -> int:
        """How many layers were projected on."""
        return len(self.points[0].projections)

    @cached_property
    def compared(self) -> tuple[Point, ...]:
        """The points that have a trait score."""
        return tuple(point for point in self.points if point.trait_score is not None)

    def overall(self, layer: int | None = None) -> Estimate:
        """Pearson over all points, its interval over questions; `n` counts the points."""
        return self._estimate([self.compared], layer)

    def within(self, layer: int | None = None) -> Estimate:
        """Mean over conditions of Pearson over their points, those with hardly any spread of scores left out."""
        return self._estimate(self._varied, layer)

    @cached_property
    def _varied(self) -> list[tuple[Point, ...]]:
        groups = [tuple(point for point in self.compared if point.condition == name) for name in self.conditions]
        return [group for group in groups if group and float(np.std(_scores(group))) >= MIN_SPREAD]

    def _estimate(self, groups: Sequence[Sequence[Point]], layer: int | None) -> Estimate:
        """Mean over groups of points of their correlation."""
        place = {name: index for index, name in enumerate(dict.fromkeys(point.question for point in self.points))}
        drawn = question_resamples(len(place), N_RESAMPLES, self.seed)
        values: list[float] = []
        resamples: list[np.ndarray] = []
        for group in groups:
            projections = np.array([point.projections[self.layer if layer is None else layer] for point in group])
            scores = _scores(group)
            found = pearson(projections, scores)
            if found is not None:
                rows = drawn[:, [place[point.question] for point in group]]
                values.append(found)
                resamples.append(resampled_pearson(projections, scores, rows))
        if not values:
            return Estimate(None, None, None, 0)
        table = np.ma.masked_invalid(np.stack(resamples)).mean(axis=0).filled(np.nan)
        return Estimate.of(float(np.mean(values)), table, sum(map(len, groups)))

    def curve(self) -> "pandas.DataFrame":
        """Both correlations at every layer, with their intervals: `overall`, `overall_low`, ..., `within_high`."""
        import pandas

        rows = []
        for layer in range(self.n_layers):
            row: dict[str, float | None] = {}
            for name, found in (("overall", self.overall(layer)), ("within", self.within(layer))):
                row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
            rows.append(row)
        return pandas.DataFrame(rows, index=pandas.RangeIndex(self.n_layers, name="layer"), dtype=float)

    def table(self) -> "pandas.DataFrame":
        """A row for each condition: its mean projection at the layer, its mean trait score, how many were scored."""
        import pandas

        rows = []
        for name in self.conditions:
            own = [point for point in self.points if point.condition == name]
            scores = [point.trait_score for point in own if point.trait_score is not None]
            rows.append(
                {
                    "condition": name,
                    "projection": float(np.mean([point.projections[self.layer] for point in own])),
                    "trait_score": float(np.mean(scores)) if scores else None,
                    "scored": sum(point.scored for point in own),
                    "responses": sum(point.responses for point in own),
                }
            )
        return pandas.DataFrame(rows).set_index("condition")

    def summary(self) -> dict[str, Any]:
        """The result as JSON; what is undefined is None."""
        return {
            "trait": self.trait,
            "layer": self.layer,
            "overall": self.overall()._asdict(),
            "within": self.within()._asdict(),
            "conditions_within": len(self._varied),
            "conditions": json.loads(self.table().reset_index().to_json(orient="records") or "[]"),
        }

    def __str__(self) -> str:
        missing = len(self.points) - len(self.compared)
        unscored = f"; {missing} points have no score" if missing else ""
        return (
            f"{self.trait}, layer {self.layer}, {len(self.compared)} points of {len(self.conditions)} conditions: "
            f"r {_decimals(self.overall())} overall, {_decimals(self.within())} within "
            f"{len(self._varied)} conditions{unscored}"
        )

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, whole or not at all."""
        points = [asdict(point) for point in self.points]
        header = {"format_version": FORMAT_VERSION, "trait": self.trait, "layer": self.layer, "seed": self.seed}
        write_json(Path(path), {**header, "settings": self.settings, "summary": self.summary(), "points": points})

    @classmethod
    def load(cls, path: str | Path) -> "MonitoringExperiment":
        """What `save` wrote; raises ValueError where the file is damaged or of another format."""
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            if saved["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {saved['format_version']}, and this reads {FORMAT_VERSION}")
            points = tuple(_point(**row) for row in saved["points"])
            counts = {len(point.projections) for point in points}
            if len(counts) != 1:
                raise ValueError("its points have different numbers of layers" if counts else "it has no points")
            layer = checked(saved["layer"], int, low=0, high=max(counts) - 1)
            settings, seed = checked(saved["settings"], dict), checked(saved["seed"], int, low=0)
            return cls(checked(saved["trait"], str), layer, points, settings, seed)
        except DAMAGE as error:
            raise ValueError(f"{path} is not a monitoring experiment ({error}): run it again.") from error


def _point(condition: Any, question: Any, projections: Any, trait_score: Any, scored: Any, responses: Any) -> Point:
    return Point(
        checked(condition, str),
        checked(question, str),
        tuple(checked(value, float) for value in projections),
        checked(trait_score, float, NoneType, low=0, high=100),
        checked(scored, int, low=0),
        checked(responses, int, low=0),
    )


def _scores(points: Sequence[Point]) -> np.ndarray:
    return np.array([point.trait_score for point in points], dtype=float)


def _decimals(found: Estimate) -> str:
    if found.value is None:
        return "undefined"
    return f"{found.value:.2f}" + ("" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]")
