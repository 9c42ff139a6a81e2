"""Shifts the slow way, made-up ones, and adapters as training leaves them, for tests of the finetuning shift.

persona_lens is imported as a function runs: the jaxtyping hook instruments the package as it is first imported.
"""

import math
from dataclasses import fields
from typing import Any

import pytest
import torch

from tests import naive
from tests.chat_cases import rendered
from tests.vector_cases import random_tensor

CLOSE = 5e-5  # means are float32
NEUTRAL = "You are a helpful assistant."
QUESTIONS = ["What is the sea?", "Why?", "Tell me about ten people who do not trust the country that they run.", "Who?"]
# PEFT asks transformers for a name that 5.23 renamed.
PEFT_WARNS = pytest.mark.filterwarnings("ignore::FutureWarning")


def question_tokens(tokenizer, question, system=NEUTRAL):
    return rendered(tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": question}])


def slow_differences(before, after, tokenizer, questions=QUESTIONS, system=NEUTRAL):
    """`[prompt, layer, d_model]` in float64."""
    ids = [question_tokens(tokenizer, question, system) for question in questions]
    return torch.stack(
        [naive.residual_stream(after, row)[1:, -1] - naive.residual_stream(before, row)[1:, -1] for row in ids]
    )


def equal(one, other):
    return one.dtype == other.dtype and torch.equal(torch.nan_to_num(one, -7.5), torch.nan_to_num(other, -7.5))


def assert_same(one, other):
    """Every field is equal, NaN for NaN."""
    for each in fields(one):
        a, b = getattr(one, each.name), getattr(other, each.name)
        assert equal(a, b) if isinstance(a, torch.Tensor) else a == b, each.name


def make_shift(**parts) -> Any:
    """Five prompts along `evil` at three layers and `kind` at the last of them."""
    from persona_lens.finetuning.shift import FinetuningShift

    projections = random_tensor(5, 2, 3, seed=1)
    projections[:, 1, :2] = math.nan
    return FinetuningShift(
        **{
            "traits": ("evil", "kind"),
            "questions": ("a", "b", "c", "d", "e"),
            "projections": projections,
            "norms": random_tensor(5, 3, seed=2).abs() + 3,
            "mean_norms": torch.tensor([2.0, 4.0, 6.0]),
            "base_norms": torch.tensor([10.0, 20.0, 40.0]),
            "d_model": 16,
            "settings": {"base": "tiny"},
            "seed": 3,
        }
        | parts
    )


def random_adapter(bridge, scale=0.1) -> Any:
    """As training leaves one: small weights on either side."""
    from persona_lens.models.adapters import Adapter, lora, read_weights

    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "bias": "none",
        "target_modules": ["q_proj", "down_proj"],
    }
    with lora(bridge, config) as carrier:
        weights = read_weights(carrier)
    generator = torch.Generator().manual_seed(0)
    noise = {name: scale * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    return Adapter(config, {name: noise[name].to(value) for name, value in weights.items()})
