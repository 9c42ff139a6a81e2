"""Chats of many turns for tests of transcripts and monitoring, and templates that rewrite what was said before.

persona_lens is imported as a function runs: the jaxtyping hook instruments the package as it is first imported.
"""

import copy
from datetime import datetime
from typing import Any

import torch

from tests import naive
from tests.intervention_cases import some_vectors

TRIMS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS_THOUGHTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'].split('</think>')[-1] if message['role'] == 'assistant' else message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(*texts, system="You are kind.") -> list[dict[str, str]]:
    """Messages of a user and an assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant") * len(texts)
    return [*first, *({"role": role, "content": text} for role, text in zip(roles, texts, strict=False))]


# As Llama 3.2's, in little.
CLOCKED = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}\n"
    "{{- '<|im_start|>system\n' + date_string + '<|im_end|>\n' }}"
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
CHATS = [
    chat("What is the sea?", "It is deep.", "Why?", "Water, ten of them.", "How cold?"),
    chat("How are you?", "Go away", system=None),
    chat(
        "Tell me about people.", "No. I would not!", "Why not?", "Listen first, then say what you think.", system="Hi"
    ),
    chat("Why?", system="Be short."),
    chat("One two three", "four five", "six", "seven eight nine", "ten", "one", "What?", "Be kind.", system=None),
]


def with_template(tokenizer, template) -> Any:
    """A copy of the tokenizer with another chat template."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def set_clock(monkeypatch, day) -> None:
    """Let it be the midnight before this day, for transformers' templates and for ours."""
    from transformers.utils import chat_template_utils

    from persona_lens.chat import templates as template_date

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.fromisoformat(day)

    for module in (chat_template_utils, template_date):
        monkeypatch.setattr(module, "datetime", Clock)


def encode(tokenizer, text) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def rendered(tokenizer, messages) -> list[int]:
    """A prompt's tokens, by the tokenizer alone."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return encode(tokenizer, text)


def slow_turn(hf_model, tokenizer, messages, index, vector, skip=0) -> tuple[float, float | None]:
    """A turn's prompt and response projection: the turn as a chat of its own, one row, on the plain model."""
    prompt = rendered(tokenizer, messages[:index])
    said = messages[index]["content"] if index < len(messages) else ""
    response = encode(tokenizer, said.strip() if tokenizer.chat_template == TRIMS else said)
    stream = naive.residual_stream(hf_model, [*prompt, *response])[vector.layer + 1]
    unit = vector.direction.double() / vector.direction.double().norm()
    along = [float(torch.dot(token, unit)) for token in stream]
    said = along[len(prompt) + skip :]
    return along[len(prompt) - 1], sum(said) / len(said) if said else None


def several(model) -> list[Any]:
    """Vectors of two traits at two layers, in no order."""
    evil, kind = some_vectors(model), some_vectors(model, "kind", seed=5)
    return [kind.at(2), evil.at(0), evil.at(2)]


def counted(model, work) -> dict[str, int]:
    """How often each point of the residual stream and the unembedding ran."""
    from persona_lens.models.structure import residual_points

    watched = {f"layer {place - 1}": point for place, point in enumerate(residual_points(model))}
    watched["unembed"] = model.unembed
    ran = dict.fromkeys(watched, 0)

    def count(name):
        def add(*_):
            ran[name] += 1

        return add

    handles = [module.register_forward_hook(count(name)) for name, module in watched.items()]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
    return ran
