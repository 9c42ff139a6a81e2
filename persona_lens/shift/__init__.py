"""The finetuning shift: how far finetuning moved a model along a trait, before a word is said.

A prompt's shift is its last token's residual stream in the finetuned model minus that in the base, projected on the
unit vector, at every layer; what counts is its mean over the evaluation prompts (arXiv:2507.21509, section 4.2).
Knows nothing about how the model was finetuned, or how its answers are judged.
"""

from persona_lens.shift.measurement import finetuning_shift
from persona_lens.shift.result import FinetuningShift

__all__ = ["FinetuningShift", "finetuning_shift"]
