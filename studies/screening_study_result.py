"""What the pieces of the screening study say together: tables, correlations, differences, and the predictions.

Pearson's correlation of dataset scores with the trait score after training over the finetuning study's sets, form
against form on the same sets; how well hidden rows are found; the trait score after training on the highest, random and
lowest rows, prompt by prompt (arXiv:2507.21509, sections 6, H, I and L).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from persona_lens.statistics import (
    N_RESAMPLES,
    SAME,
    Estimate,
    mean_estimate,
    pearson,
    question_resamples,
    resampled_pearson,
)
from studies.chosen_sets import CHOICES, Choice, ChosenSet, MeasuredSet, Prediction
from studies.screening_plan import Form

if TYPE_CHECKING:
    import pandas

MIN_AUC = 0.9
"""What was predicted of hidden rows at `PREDICTED_SHARE`."""
PREDICTED_SHARE = 0.05


@dataclass(frozen=True)
class ScreeningStudy:
    """The pieces that a folder holds; a piece that is not there yet is empty.

    Attributes:
        layer: The finetuning study's layer, where every score is taken that is not part of a curve.
        sets: The finetuning study's sets: their scores by form, layer and mood, and their trait scores after training.
        subsets: What dataset scores from a share of the rows lose, by share and mood.
        hidden: How well hidden rows are found: among what, by form, share and mood.
        runs: Chosen sets by their names.
        pairs: The A/B pairs, by trait and reading.
    """

    layer: int
    sets: dict[str, Any] = field(repr=False)
    subsets: dict[str, Any] = field(repr=False)
    hidden: dict[str, Any] = field(repr=False)
    runs: dict[str, MeasuredSet] = field(repr=False)
    pairs: dict[str, Any] = field(repr=False)

    @cached_property
    def moods(self) -> list[str]:
        """The moods that were scored."""
        return list(next(iter(self.sets.values()))["traits"]) if self.sets else []

    def dataset_scores(self, vectors: str, form: Form = "difference", layer: int | None = None) -> np.ndarray:
        """Every set's score on a mood, [set]; a classifier's has no layer."""
        place = str(self.layer if layer is None or form == "classifier" else layer)
        return np.array([record["scores"][form][place][vectors] for record in self.sets.values()], dtype=float)

    def after(self, mood: str) -> np.ndarray:
        """Every set's trait score after training, [set]."""
        return np.array([record["traits"][mood]["value"] for record in self.sets.values()], dtype=float)

    def correlation(
        self,
        mood: str,
        form: Form = "difference",
        *,
        vectors: str | None = None,
        layer: int | None = None,
        without_own: bool = False,
    ) -> Estimate:
        """Pearson's r over the sets of a dataset score with a mood's score after training; Fisher's 95 % interval.

        `vectors` names the mood that is screened for, by default the one that is scored after training. `without_own`
        leaves out the mood's own sets, which a score need only recognise.
        """
        chosen = self._others(mood) if without_own else slice(None)
        x, y = self.dataset_scores(vectors or mood, form, layer)[chosen], self.after(mood)[chosen]
        if len(x) < 4 or min(np.ptp(x), np.ptp(y)) < SAME:
            return Estimate(None, None, None, len(x))
        pearson_r: Any = stats.pearsonr(x, y)
        low, high = pearson_r.confidence_interval(0.95)
        return Estimate(float(pearson_r.statistic), float(low), float(high), len(x))

    def correlations(self, form: Form = "difference", layer: int | None = None) -> "pandas.DataFrame":
        """Correlations of every mood's score after training (row) with the score on every mood (column)."""
        import pandas

        return pandas.DataFrame(
            {
                other: {mood: self.correlation(mood, form, vectors=other, layer=layer).value for mood in self.moods}
                for other in self.moods
            },
            dtype=float,
        )

    def _others(self, mood: str) -> np.ndarray:
        return np.array([record["mood"] != mood for record in self.sets.values()])

    def mean_correlation(
        self, form: Form = "difference", layer: int | None = None, *, without_own: bool = False
    ) -> Estimate:
        """The mean over moods of their own correlations; the interval is over sets."""
        return self._mean([(form, layer, 1.0)], without_own)

    def correlation_difference(self, form: Form, other: Form, layer: int | None = None) -> Estimate:
        """The mean over moods of one form's correlation minus another's, both on the same resampled sets."""
        return self._mean([(form, layer, 1.0), (other, layer, -1.0)])

    def _mean(self, terms: Sequence[tuple[Form, int | None, float]], without_own: bool = False) -> Estimate:
        every = question_resamples(len(self.sets), N_RESAMPLES, 0)
        values, resamples = [], []
        for mood in self.moods:
            chosen = self._others(mood) if without_own else slice(None)
            y, drawn = self.after(mood)[chosen], every[:, chosen]
            sides = [(self.dataset_scores(mood, form, layer)[chosen], weight) for form, layer, weight in terms]
            correlations = [pearson(x, y) for x, _ in sides]
            if any(r is None for r in correlations):
                continue
            values.append(sum(weight * r for r, (_, weight) in zip(correlations, sides, strict=True) if r is not None))
            resamples.append(sum(weight * resampled_pearson(x, y, drawn) for x, weight in sides))
        if not values:
            return Estimate(None, None, None, len(self.sets))
        # A resample may have drawn no set that differs on one mood; the others still have a mean.
        table = np.ma.masked_invalid(np.stack(resamples)).mean(axis=0).filled(np.nan)
        return Estimate.of(float(np.mean(values)), table, len(self.sets))

    def layer_table(self) -> "pandas.DataFrame":
        """The mean correlation of each form of projection (column) at every layer that was screened (row)."""
        import pandas

        forms: tuple[Form, ...] = ("difference", "proxy", "response")
        layers = sorted(map(int, next(iter(self.sets.values()))["scores"]["difference"]))
        table = {form: {layer: self.mean_correlation(form, layer).value for layer in layers} for form in forms}
        return pandas.DataFrame(table, dtype=float).rename_axis("layer")

    def subset_table(self) -> "pandas.DataFrame":
        """By share of the rows: mean over moods of the error over the sets' spread, and of r with the trait after."""
        import pandas

        rows = {}
        for share, moods in self.subsets.items():
            error = np.mean([loss["rmse"] / loss["spread"] for loss in moods.values()])
            rows[float(share)] = {"error": error, "r": np.mean([loss["r"]["value"] for loss in moods.values()])}
        return pandas.DataFrame(rows, dtype=float).T.rename_axis("share")

    def auc(
        self, form: str = "difference", share: float = 0.05, mood: str = "mean", among: str = "neutral"
    ) -> Estimate:
        """AUC of a mood's rows hidden among others, with the central 95 % of mixtures of the share."""
        return Estimate(**self.hidden[among][form][f"{share:g}"][mood]["auc"])

    def precision(
        self, form: str = "difference", share: float = 0.05, mood: str = "mean", among: str = "neutral"
    ) -> Estimate:
        """The share of hidden rows among as many of the highest scores as were hidden."""
        return Estimate(**self.hidden[among][form][f"{share:g}"][mood]["precision"])

    def hidden_table(self, measure: str = "auc", mood: str = "mean") -> "pandas.DataFrame":
        """AUC or precision with its interval, a row for what rows are hidden among, form, and share."""
        import pandas

        rows = [
            {"among": among, "form": form, "share": float(share), **moods[mood][measure]}
            for among, forms in self.hidden.items()
            for form, shares in forms.items()
            for share, moods in shares.items()
        ]
        return pandas.DataFrame(rows).set_index(["among", "form", "share"])

    def run(self, mood: str, choice: Choice, *, is_filtered: bool) -> MeasuredSet | None:
        """One chosen set; None where it is not measured yet."""
        return self.runs.get(ChosenSet(mood, choice, is_filtered).name)

    def difference(self, one: MeasuredSet, other: MeasuredSet) -> Estimate:
        """Own score after one set minus that after another, prompt by prompt; the interval is over prompts."""
        values = np.subtract(*(np.array(chosen_set.record["own_scores"], dtype=float) for chosen_set in (one, other)))
        return mean_estimate([None if np.isnan(value) else float(value) for value in values], one.record["questions"])

    def run_table(self) -> "pandas.DataFrame":
        """Every chosen set: how it was chosen, of what it is, and what training on it did."""
        import pandas

        rows = []
        for name, measured in self.runs.items():
            record, chosen = measured.record, measured.chosen
            row = {"set": name, "mood": chosen.mood, "choice": chosen.choice, "filtered": chosen.is_filtered}
            row |= {"own_rows": measured.own_rows, "rows": record["rows"], "candidates": record["candidates"]}
            row |= {"difference": record["difference"]["mean"], "classifier": record["classifier"]}
            for measure in ("score", "coherence"):
                estimate: Estimate = getattr(measured, measure)
                row |= {measure: estimate.value, f"{measure}_low": estimate.low, f"{measure}_high": estimate.high}
            rows.append(row)
        return pandas.DataFrame(rows).set_index("set")

    def pair_table(self, measure: str = "auc") -> "pandas.DataFrame":
        """`auc` or `ordered` of the held-out pairs, with its interval: a row for trait, reading and layer."""
        import pandas

        rows = [
            {"trait": pairs["trait"], "reading": pairs["reading"], "layer": layer, **at_layer[measure]}
            for pairs in self.pairs.values()
            for layer, at_layer in enumerate(pairs["layers"])
        ]
        return pandas.DataFrame(rows).set_index(["trait", "reading", "layer"])

    def predictions(self) -> list[Prediction]:
        """What was predicted of the pieces that are there."""
        predictions: list[Prediction] = []
        if self.sets:
            against: list[tuple[Form, str]] = [("response", "plain projection"), ("proxy", "last prompt token")]
            for other, name in against:
                difference = self.correlation_difference("difference", other)
                predictions.append(
                    Prediction(f"r of the projection difference above that of the {name}", difference, 0.0)
                )
        if self.hidden:
            what = f"mean AUC of rows hidden at {PREDICTED_SHARE:.0%} among neutral ones"
            predictions.append(Prediction(what, self.auc(share=PREDICTED_SHARE), MIN_AUC))
        for mood in dict.fromkeys(measured.chosen.mood for measured in self.runs.values()):
            for is_filtered in (False, True):
                sets = {choice: self.run(mood, choice, is_filtered=is_filtered) for choice in CHOICES}
                for more, less in (("high", "random"), ("random", "low")):
                    one, other = sets[more], sets[less]
                    if one is not None and other is not None:
                        what = f"{mood}: {more} above {less}" + ", after the filter" * is_filtered
                        predictions.append(Prediction(what, self.difference(one, other), 0.0))
        return predictions

    def prediction_table(self) -> "pandas.DataFrame":
        """Every prediction with its number, interval, bound, and whether it held."""
        import pandas

        rows = [
            {
                "prediction": prediction.what,
                **prediction.found._asdict(),
                "bound": prediction.bound,
                "held": prediction.held,
            }
            for prediction in self.predictions()
        ]
        return pandas.DataFrame(rows).set_index("prediction")


def read_screening_study(folder: str | Path) -> ScreeningStudy:
    """The study of a folder, as far as it has come; raises FileNotFoundError where the folder holds none."""
    folder = Path(folder)
    if not (folder / "settings.json").exists():
        raise FileNotFoundError(f"{folder} holds no screening study: make it with `screening_study`.")
    layer = _read(folder / "settings.json")["layer"]
    sets, hidden = _read(folder / "sets.json"), _read(folder / "hidden.json")
    records = [_read(path) for path in sorted((folder / "runs").glob("*.json"))]
    runs = [MeasuredSet(ChosenSet(**record["set"]), record) for record in records]
    pairs = {path.stem: _read(path) for path in sorted((folder / "pairs").glob("*.json"))}
    return ScreeningStudy(
        layer,
        sets.get("sets", {}),
        sets.get("subsets", {}),
        hidden.get("among", {}),
        {measured.chosen.name: measured for measured in runs},
        pairs,
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
