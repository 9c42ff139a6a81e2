"""An LLM writes a trait's artifact: from a name and a sentence of description to a `Trait`, in one call.

This is step 2.1 of arXiv:2507.21509, with the monitoring prompts of its section 3.3: the LLM drafts adjectives,
contrastive instructions, questions and a rubric; the draft is checked, and goes back once with whatever is wrong.
Knows nothing about the model under study, rollouts or scores.
"""

from persona_lens.trait_generation.prompts import template_rubric
from persona_lens.trait_generation.writing import (
    TraitGenerationError,
    generate_trait,
    preview_trait,
    trait_request,
)

__all__ = ["TraitGenerationError", "generate_trait", "preview_trait", "template_rubric", "trait_request"]
