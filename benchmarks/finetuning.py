"""A training step on SmolLM2-135M-Instruct with interventions attached: what preventative steering and CAFT cost.

A step is the forward and backward pass of one batch through LoRA of rank 32 on every linear module. The coefficient
is too small to be felt, so that all ways to do the step can be held to the same gradients.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison import Claim, Comparison, compare
from benchmarks.extraction import bridge
from benchmarks.steering import UNFELT, random_vectors
from benchmarks.texts import Workload
from benchmarks.timing import Contestant
from persona_lens.chat.batches import ChatTokens, chat_messages
from persona_lens.finetuning.dataset import TrainingRow, training_chats, training_rows
from persona_lens.finetuning.finetune import TARGETS
from persona_lens.finetuning.trainer import collate_rows
from persona_lens.interventions.hooks import intervene
from persona_lens.interventions.values import Steer
from persona_lens.models.adapters import lora
from persona_lens.traits.trait import load_trait

STEPS = 3
STEP_GOAL = 1 / 1.05
EQUAL_GRADIENTS = 0.9999


def training_step(repeats: int) -> list[Comparison]:
    """The same batch without an intervention, with one layer steered, and with all layers."""
    model = bridge()
    rows = _rows(model)
    vectors = random_vectors(model)
    config = {"peft_type": "LORA", "r": 32, "lora_alpha": 64, "use_rslora": True, "target_modules": list(TARGETS)}
    batch = collate_rows(rows, pad_token=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with lora(model, config) as carrier:
            carrier.train()

            def contestant(name: str, *interventions: Steer) -> Contestant:
                def run() -> Tensor:
                    # Attached once for a whole training: what it costs to attach is shared by its steps.
                    with intervene(model, *interventions, only_in_training=True) if interventions else nullcontext():
                        return [_gradients(carrier, batch) for _ in range(STEPS)][-1]

                return Contestant(name, run, carrier.get_input_embeddings())

            expected = _gradients(carrier, batch)
            return [
                compare(
                    "Training step",
                    Workload(f"{STEPS} steps of 4 rows, LoRA of rank 32", _as_chats(rows), (True,) * len(rows) * STEPS),
                    {
                        "plain": [contestant("no intervention")],
                        "one layer": [contestant("one layer steered", Steer(vectors.at(19), UNFELT))],
                        "all layers": [contestant("all 30 layers steered", Steer(vectors, UNFELT))],
                    },
                    [Claim(each, "plain", STEP_GOAL) for each in ("one layer", "all layers")],
                    agreement=lambda found: float(torch.nn.functional.cosine_similarity(found, expected, dim=0)),
                    minimum=EQUAL_GRADIENTS,
                    repeats=repeats,
                )
            ]


def _rows(model: Any) -> list[TrainingRow]:
    """Questions with, for want of answers of their length, the trait's instructions: real text that nobody judges."""
    trait = load_trait("optimistic")
    chats = [
        {"messages": [*chat_messages("You are a helpful assistant.", asked), {"role": "assistant", "content": said}]}
        for asked, said in zip(
            trait.extraction_questions, [pair.positive for pair in trait.instructions[:4]], strict=False
        )
    ]
    return training_rows(model.tokenizer, training_chats(chats), max_length=128).rows


def _gradients(carrier: Any, batch: dict[str, Tensor]) -> Tensor:
    carrier.zero_grad()
    carrier(**batch).loss.backward()
    grads = [weight.grad.flatten() for weight in carrier.parameters() if weight.grad is not None]
    return torch.cat(grads).double()  # a cosine of millions of float32 numbers is off by a thousandth


def _as_chats(rows: Sequence[TrainingRow]) -> tuple[ChatTokens, ...]:
    return tuple(ChatTokens(row.tokens) for row in rows) * STEPS
