"""Screening training data: which data sets and samples would pull a model along a persona vector if it learnt them.

Rows stream in and are cut into fixed units. Each unit is scored here, in a shard or by a Ray actor, and written as one
Parquet file; the data sets' means are their projection differences (arXiv:2507.21509, section 6).
"""
