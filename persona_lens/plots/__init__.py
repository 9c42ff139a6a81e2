"""Pictures of results: layer sweeps and their frontier, dose-responses, layers' statistics, cosines, judges' agreement.

Every function takes a result and returns a plotly figure; a number that is missing leaves a gap, never a zero.
Knows nothing about models or files, and imports plotly, an extra, on first use.
"""

from persona_lens.plots.agreement import plot_agreement
from persona_lens.plots.cosines import plot_cosine_matrix
from persona_lens.plots.curves import plot_dose_response, plot_layer_statistics
from persona_lens.plots.sweeps import plot_frontier, plot_layer_sweep

__all__ = [
    "plot_agreement",
    "plot_cosine_matrix",
    "plot_dose_response",
    "plot_frontier",
    "plot_layer_statistics",
    "plot_layer_sweep",
]
