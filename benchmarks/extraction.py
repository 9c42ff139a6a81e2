"""Extraction throughput: response means at all layers, against forwards that read nothing and the reference's loop.

Four comparisons on SmolLM2-135M-Instruct, each a function that `python -m benchmarks` runs by its name.
"""

from functools import cache
from typing import Any

from torch import Tensor

from benchmarks.comparison import Comparison, Entry, compare
from benchmarks.contestants import (
    bare_hooked,
    bare_hugging_face,
    reference_loop,
    with_head,
    with_mean_activations,
    with_stream_means,
)
from benchmarks.oracle import oracle_means
from benchmarks.texts import ROLLOUTS_A_PROMPT, Workload, shared_prompts, short_texts
from persona_lens import load_model
from persona_lens.models import Model
from persona_lens.models.embedded import HUB_NAME, embedded_model_directory

BATCH_SIZES = (32, 1, 8)
BATCH_SIZE = 8
SMALL_BUDGET = 512
"""About eight of the short texts; the default budget takes all of them at once and pads them to the longest."""

THROUGHPUT_GOAL = 0.97
SHARED_GOALS = {"64 + 64 tokens": 1.6, "100 + 64 tokens": 1.85, "64 + 16 to 112 tokens": 1.6}
REFERENCE_GOAL = 1.8


def extraction_bridge(repeats: int) -> list[Comparison]:
    """A TransformerBridge against the bare Hugging Face forward of the same weights."""
    workload = short_texts(_bridge().tokenizer)
    return [
        compare(
            "TransformerBridge against the bare Hugging Face forward",
            workload,
            [bare_hugging_face(_hugging_face(), workload, size) for size in BATCH_SIZES],
            [
                Entry(with_stream_means(_bridge(), workload), THROUGHPUT_GOAL),
                Entry(with_stream_means(_bridge(), workload, SMALL_BUDGET), THROUGHPUT_GOAL),
                Entry(with_mean_activations(_bridge(), workload, BATCH_SIZE), THROUGHPUT_GOAL),
            ],
            expected=_expected(workload),
            repeats=repeats,
        )
    ]


def extraction_hooked(repeats: int) -> list[Comparison]:
    """A HookedTransformer against its own forward without the unembedding."""
    workload = short_texts(_bridge().tokenizer, 16)
    model = _hooked()
    return [
        compare(
            "HookedTransformer against its own forward",
            workload,
            [bare_hooked(model, workload, size) for size in BATCH_SIZES],
            [
                Entry(with_stream_means(model, workload), THROUGHPUT_GOAL),
                Entry(with_stream_means(model, workload, SMALL_BUDGET), THROUGHPUT_GOAL),
                Entry(with_mean_activations(model, workload, BATCH_SIZE), THROUGHPUT_GOAL),
            ],
            expected=_expected(workload),
            repeats=repeats,
        )
    ]


def extraction_shared_prompts(repeats: int) -> list[Comparison]:
    """Ten rollouts a prompt, the prompt shared, against the bare forward over every prompt and response."""
    n = ROLLOUTS_A_PROMPT
    ragged = [16 + 96 * (7 * index % n) // (n - 1) for index in range(n)]
    shapes = [(64, [64] * n), (100, [64] * n), (64, ragged)]
    comparisons: list[Comparison] = []
    for (shape, goal), (n_prompt, lengths) in zip(SHARED_GOALS.items(), shapes, strict=True):
        workload = shared_prompts(_bridge().tokenizer, f"2 prompts x {n} rollouts, {shape}", n_prompt, lengths)
        entries = [Entry(with_stream_means(_bridge(), workload), goal)]
        if lengths is ragged:
            entries.append(Entry(with_stream_means(_bridge(), workload, SMALL_BUDGET), goal))
        comparisons.append(
            compare(
                f"Shared prompts, {shape}",
                workload,
                [bare_hugging_face(_hugging_face(), workload, size) for size in BATCH_SIZES[::2]],
                entries,
                expected=_expected(workload),
                repeats=repeats,
            )
        )
    return comparisons


def extraction_reference(repeats: int) -> list[Comparison]:
    """A TransformerBridge against the reference code's loop, and what sorting and the missing LM head are worth."""
    workload = short_texts(_bridge().tokenizer)
    bridge = _bridge()
    return [
        compare(
            "TransformerBridge against the reference code's loop",
            workload,
            [reference_loop(_hugging_face(), workload)],
            [
                Entry(with_stream_means(bridge, workload), REFERENCE_GOAL),
                Entry(with_stream_means(bridge, workload, SMALL_BUDGET), REFERENCE_GOAL),
                Entry(with_mean_activations(bridge, workload, BATCH_SIZE), REFERENCE_GOAL),
                Entry(with_mean_activations(bridge, workload, BATCH_SIZE, sort=False)),
                Entry(with_head(bridge, workload, BATCH_SIZE)),
            ],
            expected=_expected(workload),
            repeats=repeats,
        )
    ]


@cache
def _bridge() -> Model:
    return load_model()


@cache
def _hooked() -> Model:
    return load_model(model_class="HookedTransformer")


@cache
def _hugging_face() -> Any:
    """The plain model of the same weights, with the attention that transformers takes by default."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(embedded_model_directory() or HUB_NAME, dtype="float32").eval()


@cache
def _expected(workload: Workload) -> Tensor:
    return oracle_means(_hugging_face(), workload)
