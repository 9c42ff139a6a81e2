"""How a model behaves under interventions: trait, coherence and diversity of its answers, with intervals.

Answers are sampled with the interventions acting and judged with all of them suspended; intervals resample questions.
The dose-response of a direction, and every cell of a layer sweep, is such an evaluation.
Knows nothing about which layer or coefficient is best.
"""

from persona_lens.evaluation.engines import Cell, CellEngine, IntervenedEngine
from persona_lens.evaluation.result import Evaluation
from persona_lens.evaluation.runs import RECORD_KEYS, evaluate, evaluate_cells, read_cells

__all__ = [
    "RECORD_KEYS",
    "Cell",
    "CellEngine",
    "Evaluation",
    "IntervenedEngine",
    "evaluate",
    "evaluate_cells",
    "read_cells",
]
