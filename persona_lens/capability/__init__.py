"""What a model still can, under any interventions and adapters: multiple choice, and the likelihood of given text.

The paper weighs mitigation against MMLU accuracy without giving a protocol (arXiv:2507.21509, section 5); this one is
zero-shot, by the log-probabilities of the answers' letters, with intervals over questions.
Knows nothing about traits or judges.
"""

from persona_lens.capability.harness import HarnessScores, lm_eval_accuracy
from persona_lens.capability.measurement import measure_capability
from persona_lens.capability.questions import SYSTEM_PROMPT, USER_PROMPT, Question, mmlu_sample, read_questions
from persona_lens.capability.result import AnsweredQuestion, Capability, CapabilityChange, TextLikelihood

__all__ = [
    "SYSTEM_PROMPT",
    "USER_PROMPT",
    "AnsweredQuestion",
    "Capability",
    "CapabilityChange",
    "HarnessScores",
    "Question",
    "TextLikelihood",
    "lm_eval_accuracy",
    "measure_capability",
    "mmlu_sample",
    "read_questions",
]
