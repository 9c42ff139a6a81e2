"""Finetuning with interventions in training: preventative steering, CAFT, preventative prompts, a projection penalty.

Knows nothing about how what was trained is measured.
"""

from persona_lens.finetuning.dataset import (
    Dataset,
    TrainingRow,
    TrainingRows,
    prompted,
    stated,
    training_chats,
    training_rows,
)
from persona_lens.finetuning.finetune import finetune
from persona_lens.finetuning.penalty import ProjectionPenalty, projection_change
from persona_lens.finetuning.result import Finetuning
from persona_lens.finetuning.trainer import CheckpointNotWritten, TrainingDiverged

__all__ = [
    "CheckpointNotWritten",
    "Dataset",
    "Finetuning",
    "ProjectionPenalty",
    "TrainingDiverged",
    "TrainingRow",
    "TrainingRows",
    "finetune",
    "projection_change",
    "prompted",
    "stated",
    "training_chats",
    "training_rows",
]
