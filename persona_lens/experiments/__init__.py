"""The paper's experiments as functions: each samples, judges and measures, and gives numbers with their intervals."""

from persona_lens.experiments.conditions import many_shot, system_prompts
from persona_lens.experiments.monitoring import monitoring_experiment
from persona_lens.experiments.monitoring_result import MonitoringExperiment, Point
from persona_lens.experiments.pictures import plot_experiment_layers, plot_monitoring_experiment

__all__ = [
    "MonitoringExperiment",
    "Point",
    "many_shot",
    "monitoring_experiment",
    "plot_experiment_layers",
    "plot_monitoring_experiment",
    "system_prompts",
]
