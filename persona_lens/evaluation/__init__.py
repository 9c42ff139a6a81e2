"""How a model behaves under interventions: trait score, coherence, diversity and capability, with intervals.

Answers are sampled with the interventions acting and judged with all of them suspended; intervals resample questions.
"""
