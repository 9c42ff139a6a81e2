"""Which layer steers best, and what its direction does at each dose.

Every layer is steered at the same coefficients, and the one with the highest trait score among those that stay coherent
is taken (arXiv:2507.21509, section B.4, with the coherence that it leaves out). Chosen on extraction questions,
confirmed on evaluation questions, against random directions of equal norm.
Knows nothing about pictures or files of other tools.
"""

from persona_lens.layer_selection.doses import DoseResponse, dose_response
from persona_lens.layer_selection.screens import SCREENS, FixedTexts, fixed_texts
from persona_lens.layer_selection.selection import select_layer
from persona_lens.layer_selection.sweep import LayerChoice, LayerSweep

__all__ = [
    "SCREENS",
    "DoseResponse",
    "FixedTexts",
    "LayerChoice",
    "LayerSweep",
    "dose_response",
    "fixed_texts",
    "select_layer",
]
