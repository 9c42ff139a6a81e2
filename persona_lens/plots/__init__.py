"""Pictures of results: sweeps, layers, cosines, agreement, monitoring, detection, finetuning, screenings.

Every plot takes a result and returns a plotly figure. A number that is missing leaves a gap, never a zero. Plotly is an
extra, and is imported on first use.
"""

from persona_lens.plots.agreement import plot_agreement
from persona_lens.plots.estimates import plot_grouped_estimates, plot_layer_estimates
from persona_lens.plots.finetuning import LossCurves, TraitShifts, plot_losses, plot_shift_scores, plot_trait_scores
from persona_lens.plots.layers import (
    plot_cosine_matrix,
    plot_dose_response,
    plot_frontier,
    plot_layer_statistics,
    plot_layer_sweep,
)
from persona_lens.plots.mitigation import MitigationPoint, plot_mitigation, plot_trade_off
from persona_lens.plots.monitoring import plot_layer_correlations, plot_projection_scores, plot_roc, plot_turns
from persona_lens.plots.screening import plot_screening

__all__ = [
    "LossCurves",
    "MitigationPoint",
    "TraitShifts",
    "plot_agreement",
    "plot_cosine_matrix",
    "plot_dose_response",
    "plot_frontier",
    "plot_grouped_estimates",
    "plot_layer_correlations",
    "plot_layer_estimates",
    "plot_layer_statistics",
    "plot_layer_sweep",
    "plot_losses",
    "plot_mitigation",
    "plot_projection_scores",
    "plot_roc",
    "plot_screening",
    "plot_shift_scores",
    "plot_trade_off",
    "plot_trait_scores",
    "plot_turns",
]
