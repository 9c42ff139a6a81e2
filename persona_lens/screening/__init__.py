"""Screening training data: which data sets and samples would pull a model along a persona vector if it learnt them.

Rows stream in, are cut into fixed units, scored here, in shards or by Ray actors, and end in one table whose means are
the data sets' projection differences (arXiv:2507.21509, section 6).
Knows nothing about training.
"""

from persona_lens.screening.filtering import Thresholds, count_flagged, flag_samples, judge_samples, write_split
from persona_lens.screening.result import By, Screening, read_screening
from persona_lens.screening.run import ShardsMissing, finish, screen
from persona_lens.screening.samples import Data, Rejection, Sample, Turns, named_datasets, stream_samples
from persona_lens.screening.scoring import Base, ModelScorer, RowScore, Scorer, Scoring

__all__ = [
    "Base",
    "By",
    "Data",
    "ModelScorer",
    "Rejection",
    "RowScore",
    "Sample",
    "Scorer",
    "Scoring",
    "Screening",
    "ShardsMissing",
    "Thresholds",
    "Turns",
    "count_flagged",
    "finish",
    "flag_samples",
    "judge_samples",
    "named_datasets",
    "read_screening",
    "screen",
    "stream_samples",
    "write_split",
]
