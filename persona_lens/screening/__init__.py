"""Screening training data: which data sets and samples would pull a model along a persona vector if it learnt them.

Rows stream in, are cut into fixed units, scored here, in shards or by Ray actors, and end in one table whose means are
the data sets' projection differences (arXiv:2507.21509, section 6).
Knows nothing about training.
"""
