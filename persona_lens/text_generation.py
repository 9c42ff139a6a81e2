"""Chats in, texts out: the decode loop for people who read.

Knows nothing about how tokens are drawn.
"""

from collections.abc import Mapping, Sequence

from persona_lens.chat import Message, tokenize_chat
from persona_lens.generation import generate
from persona_lens.models import Model
from persona_lens.template_date import fixed_date


@fixed_date()
def generate_text(
    model: Model,
    chats: Sequence[str | Sequence[Message]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_rows: int = 100,
    progress: bool = False,
) -> list[str]:
    """The model's reply to each chat, without special tokens: `generate`, for texts instead of token ids.

    A chat is what a user says, or messages (`role`, `content`) that the tokenizer's chat template takes. Interventions
    that are attached act. Raises ValueError for one chat where a list is expected, and for what `generate` refuses.
    """
    if isinstance(chats, str) or any(isinstance(chat, Mapping) for chat in chats):
        raise ValueError("chats is a list of chats, got a single one: put it into brackets, [chat].")
    messages = [[{"role": "user", "content": chat}] if isinstance(chat, str) else chat for chat in chats]
    completions = generate(
        model,
        [_prompt(model, number, chat) for number, chat in enumerate(messages, start=1)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_rows=batch_rows,
        progress=progress,
    )
    return [model.tokenizer.decode(each.tokens, skip_special_tokens=True) for each in completions]


def _prompt(model: Model, number: int, chat: Sequence[Message]) -> tuple[int, ...]:
    try:
        return tokenize_chat(model.tokenizer, chat).prompt
    except ValueError as error:
        raise ValueError(f"Chat {number}: {error}") from error
