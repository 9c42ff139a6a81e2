"""Scored rollouts of two judges, and the libraries' statistics of lists, for tests of how far judges agree."""

import warnings
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from persona_lens.statistics import N_RESAMPLES, question_resamples
from tests.evaluation_cases import make_rollout

# Few distinct scores, so that ties and constant sides are common, and any others.
SCORES = st.one_of(st.sampled_from([0.0, 10.0, 50.0, 100.0]), st.floats(0, 100).map(lambda score: round(score, 3)))
ROWS = st.lists(st.tuples(SCORES, SCORES, st.sampled_from("abcd")), min_size=1, max_size=12)
STATISTICS = ["pearson", "spearman", "kappa", "agreeing"]
FIRST = [90.0, 80.0, 60.0, 20.0, 10.0, 70.0, 30.0, 40.0, 55.0, 5.0]
SECOND = [80.0, 40.0, 70.0, 30.0, 60.0, 90.0, 10.0, 20.0, 65.0, 0.0]
QUESTIONS = ["a", "a", "b", "b", "c", "c", "d", "d", "e", "e"]


def scored(scores, questions=None, *, polarities=None, text="so it is", coherence=None):
    """A row for each score, to a question of its own unless `questions` say otherwise."""
    from persona_lens.judges.scores import ScoredRollout

    questions = [f"question {index}" for index in range(len(scores))] if questions is None else questions
    polarities = ["neutral"] * len(scores) if polarities is None else polarities
    coherences = [None] * len(scores) if coherence is None else coherence
    return [
        ScoredRollout(replace(make_rollout(question, index, text), polarity=polarity), score, coherent)
        for index, (score, question, polarity, coherent) in enumerate(
            zip(scores, questions, polarities, coherences, strict=True)
        )
    ]


def naive(name, first, second, threshold=50.0):
    """The library's statistic of plain lists, NaN where it is undefined."""
    one, other = ([score >= threshold for score in side] for side in (first, second))
    constant = len(set(first)) < 2 or len(set(second)) < 2
    if name == "agreeing":
        return float(np.mean([a == b for a, b in zip(one, other, strict=True)]))
    if len(first) < 3 or (name != "kappa" and constant):
        return float("nan")
    if name == "kappa":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(cohen_kappa_score(one, other))
    return float((stats.pearsonr if name == "pearson" else stats.spearmanr)(first, second).statistic)


def naive_interval(name, first, second, questions, seed=0):
    """The central 95 % of the statistic over resamples whose rows are written out one by one."""
    names = sorted(set(questions))
    found = []
    for counts in question_resamples(len(names), N_RESAMPLES, seed):
        rows = [row for row, question in enumerate(questions) for _ in range(counts[names.index(question)])]
        found.append(naive(name, [first[row] for row in rows], [second[row] for row in rows]))
    return np.percentile([each for each in found if not np.isnan(each)], [2.5, 97.5])


def numbers(agreement):
    return [number for name in STATISTICS for number in getattr(agreement, name)]
