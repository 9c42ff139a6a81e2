"""How a model behaves under interventions: trait, coherence and diversity of its answers, with intervals.

Answers are sampled with the interventions acting and judged with all of them suspended; intervals resample questions.
The dose-response of a direction, and every cell of a layer sweep, is such an evaluation.
Knows nothing about which layer or coefficient is best.
"""
