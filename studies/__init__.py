"""Studies of one small model, run from a checkout: moods, method ablations, and their part of a replication.

They are not in the wheel. Each samples, judges and measures, and gives numbers with their intervals.
"""
