"""The units in which a stage's work is counted, and what sampling and judging come to in them.

Knows nothing about stages.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from persona_lens.replication.preset import Preset


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        rollouts: Responses that are sampled.
        generated: Their tokens, at most.
        prompt_tokens: Tokens of prompts, each distinct one counted once for the responses that share it; an estimate.
        forwards: Texts that are read, each a row of a forward pass.
        read: Tokens of their responses, at most.
        trained: Rows of training passes.
        judged: Responses that a judge scores; those of moods, which a text classifier scores, are not counted.
        calls: Calls to a judge on a server.
    """

    rollouts: int = 0
    generated: int = 0
    prompt_tokens: int = 0
    forwards: int = 0
    read: int = 0
    trained: int = 0
    judged: int = 0
    calls: int = 0

    def __add__(self, other: "Work") -> "Work":
        """Both, one after the other."""
        return Work(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def __mul__(self, times: int) -> "Work":
        """The same so many times."""
        return Work(*(getattr(self, each.name) * times for each in fields(self)))


def total(works: Iterable[Work]) -> Work:
    """All of them, one after the other."""
    return sum(works, Work())


def sampling(preset: Preset, rows: int, max_new_tokens: int, *, prompts: int) -> Work:
    """Responses to prompts, of which so many are distinct."""
    tokens = round(prompts * preset.cost.prompt_tokens)
    return Work(rollouts=rows, generated=rows * max_new_tokens, prompt_tokens=tokens)


def judging(preset: Preset, pairs: int, rows: int, tokens: int, *, questions: int, contrastive: bool = False) -> Work:
    """Scores of trait and coherence: two calls a response, or the model's own reading of it under other prompts."""
    if preset.judge.kind == "openai":
        return Work(judged=rows, calls=2 * rows)
    asked = min(preset.judge.contrast_pairs or pairs, pairs - contrastive)
    texts = rows * (2 * asked + 1)
    # Responses of all pairs to a question are judged under all prompts between them, neutral ones under a few.
    prompts = questions * (2 * (pairs if contrastive else asked) + 1)
    tokens_of_prompts = round(prompts * preset.cost.prompt_tokens)
    return Work(judged=rows, forwards=texts, read=texts * tokens, prompt_tokens=tokens_of_prompts)
