"""Measurements of persona_lens, each against what it competes with in the same run; `python -m benchmarks --help`.

No speed without equality: every result is compared with a slow oracle, and a difference fails the run. A goal that is
missed does not: it is printed as missed.
"""
