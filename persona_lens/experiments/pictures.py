"""Pictures of experiments, from the ones of `plots` that take plain numbers."""

from typing import TYPE_CHECKING

from persona_lens.experiments.monitoring_result import MonitoringExperiment

if TYPE_CHECKING:
    import plotly.graph_objects


def plot_monitoring_experiment(experiment: MonitoringExperiment) -> "plotly.graph_objects.Figure":
    """Mean trait score against the last prompt token's projection, a point for each condition and question."""
    from persona_lens.plots import plot_projection_scores

    points = experiment.points
    return plot_projection_scores(
        [point.projections[experiment.layer] for point in points],
        [point.trait_score for point in points],
        [point.condition for point in points],
        title=f"{experiment.trait}: prompt projection at layer {experiment.layer}, and trait score",
        overall=experiment.overall(),
        within=experiment.within(),
        order=experiment.conditions,
        questions=[point.question for point in points],
    )


def plot_experiment_layers(experiment: MonitoringExperiment) -> "plotly.graph_objects.Figure":
    """Both correlations at every layer."""
    from persona_lens.plots import plot_layer_correlations

    layers = range(experiment.n_layers)
    return plot_layer_correlations(
        list(layers),
        [experiment.overall(layer) for layer in layers],
        [experiment.within(layer) for layer in layers],
        title=f"{experiment.trait}: prompt projection against trait score, by layer",
    )
