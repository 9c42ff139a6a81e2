"""Rollouts: a model's answers to a trait's questions under positive, negative and neutral system prompts.

They come from a model in this process or from a server, and go into a file from which an interrupted run goes on
(arXiv:2507.21509, section 2.2).
Knows nothing about scores or activations.
"""

from persona_lens.rollouts.collection import (
    collect_rollouts,
    keeps_date,
    plan_rollouts,
    recorded_date,
    sample_rollouts,
    unanswered,
)
from persona_lens.rollouts.engines import ModelEngine, RolloutEngine, StreamingEngine, without_threads
from persona_lens.rollouts.rows import Prompt, Rollout, longest_response, read_rollouts, rollouts_from_rows
from persona_lens.rollouts.server import ServerEngine

__all__ = [
    "ModelEngine",
    "Prompt",
    "Rollout",
    "RolloutEngine",
    "ServerEngine",
    "StreamingEngine",
    "collect_rollouts",
    "keeps_date",
    "longest_response",
    "plan_rollouts",
    "read_rollouts",
    "recorded_date",
    "rollouts_from_rows",
    "sample_rollouts",
    "unanswered",
    "without_threads",
]
