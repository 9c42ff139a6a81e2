"""What the runs of the finetuning study say together: tables, correlations, differences, and the paper's predictions.

Pearson's correlation of the finetuning shift with the trait score over the sets and the base model, own trait and
cross trait (arXiv:2507.21509, figure 6); a method against another on the same prompts, at equal capability where one
trades it for the trait (figure 7).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import stats

from persona_lens.statistics import Estimate, mean_estimate
from studies.finetuning_plan import StudyRun

if TYPE_CHECKING:
    import pandas

Measure = Literal["nll", "coherence", "margin"]


@dataclass(frozen=True)
class MeasuredRun:
    """One run and what was measured of it; `record` is what `finetuning_study` wrote."""

    run: StudyRun
    record: dict[str, Any] = field(repr=False)

    def score(self, mood: str) -> Estimate:
        """Mean classifier score, 0 to 100, of a mood."""
        return Estimate(**self.record["traits"][mood])

    @property
    def own(self) -> Estimate:
        """The score of its own mood."""
        return self.score(self.run.mood)

    @property
    def own_scores(self) -> list[float | None]:
        """Each answer's score of its own mood; answers stand in one order in all runs."""
        return self.record["own_scores"]

    @property
    def coherence(self) -> Estimate:
        """Mean coherence, 0 to 100, under the base model."""
        return Estimate(**self.record["coherence"])

    @property
    def margin(self) -> Estimate:
        """How much likelier, in nats, the right answer's letter is than the wrong ones, on multiple choice."""
        return self._able("margin")

    @property
    def nll(self) -> Estimate:
        """Negative log-likelihood per token, in nats, of the base model's own neutral answers."""
        return self._able("nll")

    @property
    def accuracy(self) -> Estimate:
        """Share of multiple-choice questions answered right, 0 to 1."""
        return self._able("accuracy")

    def _able(self, measure: str) -> Estimate:
        capability = self.record.get("capability")
        return Estimate(None, None, None, 0) if capability is None else Estimate(**capability[measure])

    def kept(self, measure: Measure) -> float:
        """How much of what the model could is left by one measure: the more the better."""
        value = getattr(self, measure).value
        return -value if measure == "nll" else value

    @property
    def loss(self) -> float | None:
        """Training loss of the last epoch's steps, nats a token; what steering made of it while training included."""
        losses = (self.record["training"] or {}).get("loss")
        return None if not losses else float(np.mean(losses[len(losses) // 2 :]))

    def shift(self, vectors: str, layer: int) -> float:
        """Mean shift of the last prompt token along vectors, in the units of the residual stream."""
        return self.record["shift"][vectors][layer]


@dataclass(frozen=True)
class FinetuningStudy:
    """The runs that a folder holds.

    Attributes:
        runs: Measured runs by their names.
        questions: The question of each answer, in the order in which all runs answered.
        layer: Where shifts are read: the layer chosen most often for steering the base model.
    """

    runs: dict[str, MeasuredRun] = field(repr=False)
    questions: tuple[str, ...] = field(repr=False)
    layer: int

    @property
    def moods(self) -> list[str]:
        """The moods that were scored."""
        return list(self.runs["base"].record["traits"])

    @property
    def sets(self) -> list[MeasuredRun]:
        """The base model, and the plain runs on a mood's rows."""
        return [
            run for run in self.runs.values() if run.run.method == "none" and run.run.rows in ("base", "full", "half")
        ]

    def correlation(self, vectors: str, mood: str, layer: int | None = None) -> Estimate:
        """Pearson's r of the shift along vectors with a mood's score, over the sets; Fisher's 95 % interval."""
        layer = self.layer if layer is None else layer
        x = [each.shift(vectors, layer) for each in self.sets]
        y = [each.score(mood).value for each in self.sets]
        if len(x) < 4 or np.ptp(x) == 0 or np.ptp(np.array(y, dtype=float)) == 0:
            return Estimate(None, None, None, len(x))
        found: Any = stats.pearsonr(x, y)
        low, high = found.confidence_interval(0.95)
        return Estimate(float(found.statistic), float(low), float(high), len(x))

    def correlations(self, contrast: str = "{}", layer: int | None = None) -> "pandas.DataFrame":
        """Correlations of every mood's score (row) with the shift along every mood's vectors (column).

        The diagonal is own trait. `contrast` names the vectors, as `AGAINST_NEUTRAL` does.
        """
        import pandas

        return pandas.DataFrame(
            {
                other: {mood: self.correlation(contrast.format(other), mood, layer).value for mood in self.moods}
                for other in self.moods
            },
            dtype=float,
        )

    def trait_table(self) -> "pandas.DataFrame":
        """Mean score of every mood (column) after finetuning on every set (row), the base model first."""
        import pandas

        return pandas.DataFrame(
            {run.run.name: {mood: run.score(mood).value for mood in self.moods} for run in self.sets}
        ).T

    def table(self) -> "pandas.DataFrame":
        """Every run with its numbers."""
        import pandas

        rows = []
        for name, measured in self.runs.items():
            run = measured.run
            row: dict[str, Any] = {"run": name, "mood": run.mood, "rows": run.rows, "method": run.method}
            row |= {"coefficient": run.coefficient}
            estimates: dict[str, Estimate | None] = {
                "trait": measured.own if run.mood else None,
                "coherence": measured.coherence,
            }
            ratio = measured.record["likelihood_ratios"].get(run.mood)
            estimates |= {"ratio": None if ratio is None else Estimate(**ratio)}
            estimates |= {"accuracy": measured.accuracy, "margin": measured.margin, "nll": measured.nll}
            overlap = measured.record.get("overlap")
            estimates |= {"copied": overlap and Estimate(*(overlap[key] for key in Estimate._fields))}
            for measure, value in estimates.items():
                ends = (None, None, None) if value is None else value[:3]
                row |= dict(zip((measure, f"{measure}_low", f"{measure}_high"), ends, strict=True))
            rows.append({**row, "loss": measured.loss})
        return pandas.DataFrame(rows).set_index("run")

    @cached_property
    def mitigated(self) -> list[str]:
        """The moods for which methods were tried, those whose plain run is there."""
        tried = dict.fromkeys(run.run.mood for run in self.runs.values() if run.run.method != "none")
        return [mood for mood in tried if f"{mood}_full" in self.runs]

    def methods(self, mood: str, method: str, rows: str = "full") -> list[MeasuredRun]:
        """The runs of one method on one mood, by the size of the dose."""
        runs = [
            run
            for run in self.runs.values()
            if run.run.mood == mood and run.run.method == method and run.run.rows == rows
        ]
        return sorted(runs, key=lambda run: abs(run.run.coefficient))

    def difference(self, one: MeasuredRun, other: MeasuredRun) -> Estimate:
        """Own score of one run minus that of another, answer by answer; the interval is over prompts."""
        return self._difference(one, [(other, 1.0)])

    def _difference(self, one: MeasuredRun, others: Sequence[tuple[MeasuredRun, float]]) -> Estimate:
        columns = [np.array(one.own_scores, dtype=float)]
        columns += [weight * np.array(other.own_scores, dtype=float) for other, weight in others]
        values = columns[0] - np.sum(columns[1:], axis=0)
        return mean_estimate([None if np.isnan(value) else float(value) for value in values], self.questions)

    def at_equal_capability(self, one: MeasuredRun, measure: Measure = "nll") -> Estimate | None:
        """Own score of a run minus post-hoc steering's where that has left as much of what the model could.

        Post-hoc steering is followed from no dose upwards, on straight lines between doses, to where it first has
        fallen to what the run has kept. None where it never does, so that there is nothing to compare with. The
        interval is over prompts and takes the doses as given.
        """
        curve = [self.runs[f"{one.run.mood}_full"], *self.methods(one.run.mood, "post-hoc")]
        wanted = one.kept(measure)
        if curve[0].kept(measure) <= wanted:
            return self.difference(one, curve[0])
        for before, after in pairwise(curve):
            high, low = before.kept(measure), after.kept(measure)
            if low <= wanted < high:
                share = (high - wanted) / (high - low)
                return self._difference(one, [(before, 1 - share), (after, share)])
        return None


def read_study(folder: str | Path) -> FinetuningStudy:
    """The study of a folder, as far as it has come.

    Raises FileNotFoundError where the folder holds none, or not yet the base model's run.
    """
    folder = Path(folder)
    if not (folder / "runs" / "base.json").exists():
        raise FileNotFoundError(f"{folder} holds no finetuning study with a base run: make it with `finetuning_study`.")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "runs").glob("*.json"))]
    runs = [MeasuredRun(StudyRun(**record["run"]), record) for record in records]
    chosen = json.loads((folder / "layers.json").read_text(encoding="utf-8"))
    layers = sorted(run["layer"] for run in chosen.values())
    layer = max(layers, key=layers.count)
    base = next(run for run in runs if run.run.rows == "base" and run.run.method == "none")
    return FinetuningStudy({run.run.name: run for run in runs}, tuple(base.record["questions"]), layer)
