"""Pictures of the monitoring experiment: projection against trait score, and both correlations by layer."""

from typing import TYPE_CHECKING

from persona_lens.monitoring.experiment import MonitoringExperiment
from persona_lens.plots.monitoring import plot_layer_correlations, plot_projection_scores

if TYPE_CHECKING:
    import plotly.graph_objects


def plot_monitoring_experiment(experiment: MonitoringExperiment) -> "plotly.graph_objects.Figure":
    """Mean trait score against the last prompt token's projection, a point for each condition and question."""
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
    layers = range(experiment.n_layers)
    return plot_layer_correlations(
        list(layers),
        [experiment.overall(layer) for layer in layers],
        [experiment.within(layer) for layer in layers],
        title=f"{experiment.trait}: prompt projection against trait score, by layer",
    )
