"""Judges: how strongly a response shows a trait, and how coherent it is, both from 0 to 100; and the keep rule.

A judge runs with every intervention suspended and adapters off, so a measure never measures itself
(arXiv:2507.21509, sections 2.2 and B). A missing score is None, never 0.
"""

from persona_lens.judges.agreement import Agreement, ScorePair, judge_agreement
from persona_lens.judges.classifier import ClassifierJudge, TextClassifier
from persona_lens.judges.coherence import CoherenceScale
from persona_lens.judges.combined import CombinedJudge
from persona_lens.judges.cross_validation import CrossValidation
from persona_lens.judges.human_scores import read_human_scores
from persona_lens.judges.keep import KeepReport, keep_pairs, pair_rollouts
from persona_lens.judges.lexicon import SentimentJudge
from persona_lens.judges.likelihood import intervened_log_likelihoods, mean_log_likelihoods
from persona_lens.judges.likelihood_ratio import Calibration, LikelihoodRatioJudge
from persona_lens.judges.llm import LLMJudge
from persona_lens.judges.scores import (
    Judge,
    Score,
    ScoredRollout,
    read_scores,
    scorable_questions,
    score_rollouts,
    unscored,
)

__all__ = [
    "Agreement",
    "Calibration",
    "ClassifierJudge",
    "CoherenceScale",
    "CombinedJudge",
    "CrossValidation",
    "Judge",
    "KeepReport",
    "LLMJudge",
    "LikelihoodRatioJudge",
    "Score",
    "ScorePair",
    "ScoredRollout",
    "SentimentJudge",
    "TextClassifier",
    "intervened_log_likelihoods",
    "judge_agreement",
    "keep_pairs",
    "mean_log_likelihoods",
    "pair_rollouts",
    "read_human_scores",
    "read_scores",
    "scorable_questions",
    "score_rollouts",
    "unscored",
]
