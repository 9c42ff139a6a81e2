"""Pictures of experiments, from the ones of `plots` that take plain numbers."""

from typing import TYPE_CHECKING

from persona_lens.statistics import Estimate
from studies.chosen_sets import CHOICES
from studies.finetuning_result import FinetuningStudy, MeasuredRun
from studies.screening_plan import Form
from studies.screening_study_result import ScreeningStudy

if TYPE_CHECKING:
    import plotly.graph_objects

    from persona_lens.plots.mitigation import MitigationPoint

# What multiple choice is to a large model: at 135M its margin is noise around 0.
LIKELIHOOD = "log-likelihood of neutral text (nats a token)"


def plot_study_scores(study: FinetuningStudy) -> "plotly.graph_objects.Figure":
    """Every mood's score after finetuning on every set; the shape of arXiv:2507.21509, figure 5."""
    from persona_lens.plots.finetuning import plot_trait_scores

    return plot_trait_scores(study.trait_table(), base="base")


def plot_study_shifts(study: FinetuningStudy) -> "plotly.graph_objects.Figure":
    """Each mood's score against the shift along its vector, a point for each set; the shape of figure 6."""
    from persona_lens.plots.finetuning import TraitShifts, plot_shift_scores

    sets = study.sets
    panels = [
        TraitShifts(
            mood,
            [run.shift(mood, study.layer) for run in sets],
            [run.score(mood) for run in sets],
            study.correlation(mood, mood),
            [run.run.name for run in sets if run.run.mood == mood],
        )
        for mood in study.moods
    ]
    title = f"mean trait score after finetuning against the finetuning shift at layer {study.layer}"
    return plot_shift_scores(panels, [run.run.name for run in sets], base="base", title=title)


def plot_study_mitigation(study: FinetuningStudy) -> "plotly.graph_objects.Figure":
    """Score, coherence and capability by method and dose, for each mitigated mood; the shape of figure 7."""
    from persona_lens.plots.mitigation import plot_mitigation

    points = {mood: _points(study, mood) for mood in study.mitigated}
    return plot_mitigation(points, capability=LIKELIHOOD)


def plot_study_trade_off(study: FinetuningStudy, mood: str) -> "plotly.graph_objects.Figure":
    """One mood's score against what the model still can, a line for each method."""
    from persona_lens.plots.mitigation import plot_trade_off

    return plot_trade_off(_points(study, mood), trait=mood, axis=LIKELIHOOD)


def plot_screening_scores(study: ScreeningStudy, form: Form = "difference") -> "plotly.graph_objects.Figure":
    """Each mood's score after training against its dataset score before, a point for each set."""
    from persona_lens.plots.finetuning import TraitShifts, plot_shift_scores

    panels = [
        TraitShifts(
            mood,
            study.dataset_scores(mood, form).tolist(),
            [Estimate(**record["traits"][mood]) for record in study.sets.values()],
            study.correlation(mood, form),
            [name for name, record in study.sets.items() if record["mood"] == mood],
        )
        for mood in study.moods
    ]
    named = "text classifier's score of the set" if form == "classifier" else f"dataset score: {form}"
    title = f"mean trait score after training against the dataset score before, layer {study.layer}"
    note = "mean over the set's rows, on the mood's vector or by its classifier"
    return plot_shift_scores(panels, list(study.sets), title=title, across=named, note=note)


def plot_screening_runs(study: ScreeningStudy) -> "plotly.graph_objects.Figure":
    """Each target mood's score after training on the rows that were chosen for it, before the filter and after it."""
    from persona_lens.plots.estimates import plot_grouped_estimates

    groups: dict[str, dict[str, Estimate]] = {}
    for mood in dict.fromkeys(measured.chosen.mood for measured in study.runs.values()):
        for is_filtered in (False, True):
            sets = {choice: study.run(mood, choice, is_filtered=is_filtered) for choice in CHOICES}
            bars = {choice: measured.score for choice, measured in sets.items() if measured is not None}
            if bars:
                groups[mood + ", filtered" * is_filtered] = bars
    title = "mean trait score after training on the highest, random and lowest rows"
    return plot_grouped_estimates(groups, title=title, upward="mean trait score (0 to 100)")


def plot_screening_pairs(study: ScreeningStudy) -> "plotly.graph_objects.Figure":
    """The share of held-out A/B pairs whose answer with the trait projects higher, at every layer."""
    from persona_lens.plots.estimates import plot_layer_estimates

    series = {
        f"{pairs['trait']}, {pairs['reading']}": [Estimate(**layer["ordered"]) for layer in pairs["layers"]]
        for pairs in study.pairs.values()
    }
    title = "held-out A/B pairs in which the answer with the trait projects higher"
    return plot_layer_estimates(series, title=title, upward="share of pairs", chance=0.5)


def _negative(estimate: Estimate) -> Estimate:
    value, low, high = (None if end is None else -end for end in (estimate.value, estimate.high, estimate.low))
    return Estimate(value, low, high, estimate.n)


def _points(study: FinetuningStudy, mood: str) -> "list[MitigationPoint]":
    from persona_lens.plots.mitigation import MitigationPoint

    def point(run: MeasuredRun) -> MitigationPoint:
        dose = abs(run.run.coefficient) or None
        return MitigationPoint(run.run.method, dose, run.own, run.coherence, _negative(run.nll))

    return [point(run) for run in study.runs.values() if run.run.mood == mood and run.run.rows == "full"]
