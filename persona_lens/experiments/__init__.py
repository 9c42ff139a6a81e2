"""The paper's experiments as functions: each samples, judges and measures, and gives numbers with their intervals."""

from persona_lens.experiments.chosen_sets import ChosenSet, MeasuredSet, Prediction
from persona_lens.experiments.conditions import judged_examples, many_shot, system_prompts
from persona_lens.experiments.finetuning_plan import StudyRun, StudySettings
from persona_lens.experiments.finetuning_result import FinetuningStudy, MeasuredRun, read_study
from persona_lens.experiments.finetuning_study import finetuning_study
from persona_lens.experiments.method_ablations import MethodAblations, method_ablations
from persona_lens.experiments.method_variants import Variant, method_variants
from persona_lens.experiments.monitoring import monitoring_experiment
from persona_lens.experiments.monitoring_result import MonitoringExperiment, Point
from persona_lens.experiments.pictures import (
    plot_experiment_layers,
    plot_monitoring_experiment,
    plot_screening_pairs,
    plot_screening_runs,
    plot_screening_scores,
    plot_study_mitigation,
    plot_study_scores,
    plot_study_shifts,
    plot_study_trade_off,
)
from persona_lens.experiments.screening_plan import ScreeningSettings
from persona_lens.experiments.screening_study import screening_study
from persona_lens.experiments.screening_study_result import ScreeningStudy, read_screening_study

__all__ = [
    "ChosenSet",
    "FinetuningStudy",
    "MeasuredRun",
    "MeasuredSet",
    "MethodAblations",
    "MonitoringExperiment",
    "Point",
    "Prediction",
    "ScreeningSettings",
    "ScreeningStudy",
    "StudyRun",
    "StudySettings",
    "Variant",
    "finetuning_study",
    "judged_examples",
    "many_shot",
    "method_ablations",
    "method_variants",
    "monitoring_experiment",
    "plot_experiment_layers",
    "plot_monitoring_experiment",
    "plot_screening_pairs",
    "plot_screening_runs",
    "plot_screening_scores",
    "plot_study_mitigation",
    "plot_study_scores",
    "plot_study_shifts",
    "plot_study_trade_off",
    "read_screening_study",
    "read_study",
    "screening_study",
    "system_prompts",
]
