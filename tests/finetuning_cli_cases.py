"""What tests of `finetune`, `shift` and `evaluate` share: rows in files, and an adapter of random weights.

persona_lens is imported as a function runs: the jaxtyping hook instruments the package as it is first imported.
"""

import json

from tests.chat_cases import chat
from tests.vector_cases import random_tensor

QUIET = ("--threads", 1)
CHATS = [chat(f"How is number {number}?", f"Number {number} is kind.") for number in range(4)]
CHOICES = [
    {"question": "What is the sea?", "choices": ["Water", "People"], "answer": "A"},
    {"question": "How many?", "choices": ["one", "two", "three"], "answer": 2},
    {"question": "Who would trust them?", "choices": ["You", "I"], "answer": "B"},
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def usage_error(text):
    """What standard error says of bad usage, without its frame."""
    return " ".join(text.replace("│", " ").split())


def make_adapter(model, folder):
    """A folder with an adapter of random weights, large enough to change what the model says."""
    from persona_lens.models.adapters import Adapter, lora, read_weights

    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    with lora(model, config) as carrier:
        weights = read_weights(carrier)
    noise = {
        name: random_tensor(*value.shape, seed=seed).to(value) for seed, (name, value) in enumerate(weights.items())
    }
    Adapter(config, noise).save(folder)
    return folder
